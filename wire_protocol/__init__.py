"""The contract between devices and the server.

Topics, messages, LoRA configurations, adapter bytes and errors, and nothing
else: no I/O, no clock, no torch. ``errors``, ``lora``, ``model_family`` and
``tensors`` are also read by the trainer, which may run under Python 3.8 with
nothing but NumPy and safetensors; importing this package imports neither them
nor pydantic.
"""
