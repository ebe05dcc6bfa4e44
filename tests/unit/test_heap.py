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

from ppo_dist import device, heap
from ppo_dist.cluster.driver import long_lived
from ppo_dist.models import kernels

ROOT = Path(__file__).parents[2]
LARGE, TENSORS = heap.KEPT, 8  # bytes; as the logits of a chunk are
SMALL, ROWS = 2**18, 400  # as the rows of a step are
TIMES = 8
is_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's"
)


def tensors() -> None:
    kept = [torch.empty(LARGE, dtype=torch.uint8).fill_(1) for _ in range(TENSORS)]
    del kept


def rows() -> None:
    kept = [bytearray(b"x") * SMALL for _ in range(ROWS)]
    del kept


def faults(work: Callable[[], None]) -> int:
    """Page faults of several times, after as many that do not count."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(TIMES):
            work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def in_another_process(tell: Callable[[], None]) -> list[int]:
    """What it prints: settings of malloc stay for as long as a process lives."""
    command = [sys.executable, "-c", f"import tests.unit.test_heap as own; own.{tell.__name__}()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@is_glibc
def test_what_a_cpu_worker_frees_is_there_for_the_next_time() -> None:
    before, *after = in_another_process(tell_faults)
    assert max(after) < before / 20


def tell_faults() -> None:
    before = faults(rows)
    device.prepare("cpu", 1)
    print(before, faults(rows), faults(tensors))


@is_glibc
def test_the_driver_keeps_what_a_step_frees() -> None:
    before, after = in_another_process(tell_drivers_faults)
    assert after < before / 20


def tell_drivers_faults() -> None:
    before = faults(rows)
    with long_lived():
        print(before, faults(rows))


@is_glibc
def test_what_is_free_can_be_handed_back() -> None:
    kept, left = in_another_process(tell_memory)
    assert kept > LARGE * TENSORS * 0.9
    assert left < LARGE * TENSORS * 0.1


def tell_memory() -> None:
    where = device.prepare("cpu", 1)
    tensors()  # what torch itself takes at its first
    device.free_cache(where)
    before = psutil.Process().memory_info().rss
    tensors()
    kept = psutil.Process().memory_info().rss - before
    device.free_cache(where)
    print(kept, psutil.Process().memory_info().rss - before)


@pytest.mark.parametrize(("vocabulary", "positions"), [(100, 256), (49_152, 160), (10**6, 128)])
def test_logits_of_a_chunk_are_kept_where_that_leaves_it_large_enough(
    vocabulary: int, positions: int
) -> None:
    assert kernels.logits_chunk(torch.empty(vocabulary, 1)) == positions
