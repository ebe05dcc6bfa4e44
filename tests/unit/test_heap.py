"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ppo_dist import device

ROOT = Path(__file__).parents[2]
LARGE = 64 * 2**20  # bytes: more than malloc adapts itself to
SMALL, PIECES = 2**18, 400  # as the rows of a step are
is_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's"
)


def large_tensor() -> None:
    torch.empty(LARGE, dtype=torch.uint8).fill_(1)


def many_rows() -> None:
    kept = [bytearray(b"x") * SMALL for _ in range(PIECES)]
    del kept


def faults(work: Callable[[], None]) -> int:
    """Page faults of a third time."""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def in_another_process(tell: Callable[[], None]) -> list[int]:
    """What it prints: settings of malloc stay for as long as a process lives."""
    command = [sys.executable, "-c", f"import tests.unit.test_heap as own; own.{tell.__name__}()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@is_glibc
def test_what_a_cpu_worker_frees_is_there_for_the_next_time() -> None:
    large_before, small_before, large, small = in_another_process(tell_faults)
    assert large < large_before / 20
    assert small < small_before / 20


def tell_faults() -> None:
    before = [faults(large_tensor), faults(many_rows)]
    device.prepare("cpu", 1)
    print(*before, faults(large_tensor), faults(many_rows))


@is_glibc
def test_what_is_free_can_be_handed_back() -> None:
    kept, left = in_another_process(tell_memory)
    assert kept > LARGE * 0.9
    assert left < LARGE * 0.1


def tell_memory() -> None:
    where = device.prepare("cpu", 1)
    large_tensor()  # what torch itself takes at its first
    device.free_cache(where)
    before = psutil.Process().memory_info().rss
    large_tensor()
    kept = psutil.Process().memory_info().rss - before
    device.free_cache(where)
    print(kept, psutil.Process().memory_info().rss - before)
