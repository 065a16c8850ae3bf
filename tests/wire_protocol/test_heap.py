"""What is freed between things that stay goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED_BETWEEN_WHAT_STAYS = """
import json, os
from wire_protocol.heap import give_back, use_few_arenas

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

use_few_arenas()
pieces = [bytes(20_000) for _ in range(5_000)]
stay = pieces[::50]
full = resident()
del pieces
before = resident()
give_back()
print(json.dumps([full, before, resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_between_what_stays_is_given_back() -> None:
    command = [sys.executable, "-c", FREED_BETWEEN_WHAT_STAYS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    full, before, after = (int(one) for one in done.stdout.strip("[]\n").split(","))
    freed = 0.98 * 5_000 * 20_000
    assert full - before < 0.5 * freed, "it goes back by itself; this test shows nothing"
    assert full - after > 0.8 * freed
