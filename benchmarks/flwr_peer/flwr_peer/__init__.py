"""The other side of ``benchmarks/round_overhead.py``."""
