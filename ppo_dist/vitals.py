"""What the processes of a run take: seconds, cores, memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil

from ppo_dist import device
from ppo_dist.reports import Vitals


class Pulse:
    """Counts the seconds that this process is at work, and what it takes with those it started."""

    def __init__(self, peak_memory: Callable[[], int | None] = device.peak_memory) -> None:
        """`peak_memory` of a GPU is asked where it is not this process that computes."""
        self._peak_memory = peak_memory
        self._process = psutil.Process()
        self._busy_s = 0.0
        self._asked, self._cpu_s = time.perf_counter(), self._taken()[0]

    def add(self, seconds: float) -> None:
        """It was at work that long."""
        self._busy_s += seconds

    def vitals(self) -> Vitals:
        """Since this was last asked."""
        now, (cpu_s, memory) = time.perf_counter(), self._taken()
        # what a process that has ended took is gone with it
        more = max(cpu_s - self._cpu_s, 0.0)
        found = Vitals(self._busy_s, now - self._asked, more, memory, self._peak_memory())
        self._asked, self._cpu_s, self._busy_s = now, cpu_s, 0.0
        return found

    def _taken(self) -> tuple[float, int]:
        """Seconds of CPU and bytes of memory."""
        cpu_s, memory = 0.0, 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                times = process.cpu_times()
                cpu_s += times.user + times.system
                memory += process.memory_info().rss
        return cpu_s, memory
