"""`ppo-dist bench-weights`: how fast a version gets from the learners to the rollout workers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ppo_dist import build
from ppo_dist.config import Config, InputError

MEGABYTE = 10**6


@dataclass(frozen=True)
class Load:
    """A version of that many megabytes (10⁶ bytes) for that many rollout workers, several times.

    Example: Load(megabytes=500, workers=4, bucket_mb=64, repeats=5)
    """

    megabytes: int
    workers: int
    bucket_mb: int
    repeats: int


def bench_weights(load: Load, kinds: Sequence[str], console: Console) -> int:
    """Prints the median bandwidth of each transport: bytes that arrived, at all workers together, a
    second, from the beginning of publishing until the last worker has checked and read them.

    Raises:
        InputError: a transport is not known, or the machine has no room.
    """
    table = Table("transport", "MB/s to all", "median seconds", "slowest", "fastest")
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="ppo_dist-bench-") as folder:
            seconds = _measured(_config(load, kind, folder), load)
        median = statistics.median(seconds)
        rate = load.megabytes * load.workers / median
        row = (f"{rate:.0f}", f"{median:.2f}", f"{max(seconds):.2f}", f"{min(seconds):.2f}")
        table.add_row(kind, *row)
    console.print(table)
    return 0


def _measured(config: Config, load: Load) -> list[float]:
    """Seconds of each round but the first."""
    nbytes, found = load.megabytes * MEGABYTE, []
    with build.cluster(config), build.connected(config, "none") as (ranks, remote, _):
        threads = ThreadPoolExecutor(load.workers)
        for version in range(1, load.repeats + 2):
            begin = time.perf_counter()
            weights = ranks.probe(nbytes, version)
            list(threads.map(lambda worker, sent=weights: worker.probe(sent), remote))
            found.append(time.perf_counter() - begin)
    return found[1:]


def _config(load: Load, kind: str, folder: str) -> Config:
    if kind not in ("store", "collective", "disk"):
        raise InputError(f"{kind} is not one of store, collective, disk")
    return Config.model_validate(
        {
            "run": {"dir": folder},
            "train": {"steps": 1},
            "model": {"path": "none"},
            "data": {"verifiable": "none"},
            "reward": {"verifiable": "exact"},
            "rollout": {"workers": load.workers},
            "transport": {"kind": kind, "bucket_mb": load.bucket_mb},
            "cluster": {
                "cpus": load.workers + 1,
                # store and disk carry what is on the CPU, wherever workers compute
                "device": "auto" if kind == "collective" else "cpu",
            },
            "tracking": {"wandb": "off"},
        }
    )
