"""What the machine can do, and how long something takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ppo_dist.device import DTYPES

Shape: TypeAlias = tuple[int, int, int]
# rows, what is summed over, columns: of a product as a small model has it, and of a large one
LAYER, LARGE = (512, 1024, 1024), (2048, 2048, 2048)
WORK = 1e11  # about as many FLOPs are measured at one time


def gemm(dtype: str) -> float:
    """GFLOP/s of a matrix product as a small model has it: what the machine can do."""
    return rate(timed(products(dtype, LAYER), 1), LAYER)


def faster(*dtypes: str) -> str:
    """The number format in which such a product takes least."""
    seconds = timed_in_turn(5, *(products(dtype, LAYER, 1e9) for dtype in dtypes))
    return min(zip(seconds, dtypes, strict=True))[1]


def rate(seconds: float, shape: Shape) -> float:
    """GFLOP/s of what `products` does."""
    return count(shape, WORK) * 2 * math.prod(shape) / seconds / 1e9


def count(shape: Shape, total: float) -> int:
    """How many products are about that many FLOPs."""
    return max(1, round(total / (2 * math.prod(shape))))


def products(dtype: str, shape: Shape, total: float = WORK) -> Callable[[], None]:
    """Matrix products, one after the other."""
    rows, inner, columns = shape
    a = torch.randn(rows, inner, dtype=DTYPES[dtype])
    b = torch.randn(inner, columns, dtype=DTYPES[dtype])

    def work() -> None:
        for _ in range(count(shape, total)):
            a @ b

    return work


def timed(work: Callable[[], Any], times: int, warm: bool = True) -> float:
    """Median seconds, after a first time that does not count."""
    if warm:
        work()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def timed_in_turn(times: int, *works: Callable[[], Any]) -> list[float]:
    """Median seconds of each, so that a machine that is slower for a while is so for all."""
    taken = [[timed(work, 1, warm=not turn) for work in works] for turn in range(times)]
    return [statistics.median(each) for each in zip(*taken, strict=True)]
