"""Which blocks the C library keeps for the next step, seen by its own counts."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

PROBE = """
import ctypes, json, sys
from growth_ds.engine.memory import keep_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks mapped a b used free top".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
library.malloc.restype = ctypes.c_void_p
found = []
for weights, ranks in json.loads(sys.argv[1]):
    keep_memory(weights, ranks)
    for size in (2**25 - 4096, 2**25 + 4096):
        before = library.mallinfo2()
        block = library.malloc(ctypes.c_size_t(size))
        within = library.mallinfo2().mapped - before.mapped
        library.free(ctypes.c_void_p(block))
        found.append([within > 0, library.mallinfo2().mapped - before.mapped])
        library.malloc_trim(0)  # a gap that holds it is taken in any case
print(json.dumps(found))
"""
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library has no mallinfo2")
KEPT, MAPPED = [False, 0], [True, 0]


def test_only_large_blocks_of_large_models_on_several_ranks_go_back_to_the_system():
    cases = [(0, 2), (2**26 - 1, 2), (2**26, 1), (2**26, 2), (2**30, 8), (0, 2)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROBE, json.dumps(cases)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    first, second, third, large, larger, again = zip(*[iter(json.loads(run.stdout))] * 2, strict=True)
    for kept in (first, second, third, again):  # an engine of a small model after one of a large: from the heap again
        assert kept == (KEPT, KEPT)
    for mapped in (large, larger):
        assert mapped == (KEPT, MAPPED)


def test_who_chose_already_is_heard():
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096"}
    command = [sys.executable, "-c", PROBE, json.dumps([(0, 1)])]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(run.stdout) == [MAPPED, MAPPED]
