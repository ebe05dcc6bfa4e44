"""Programs that the launch scripts start, in a home and an environment of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent


def environment(home: Path) -> dict[str, str]:
    """Of somebody who has this Python on PATH, and no token."""
    home.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    return kept | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PPO_DIST_VENV": "none",
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system and Ray's workers choose from."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def wait_for(what: Callable[[], bool], seconds: float, why: Callable[[], object] = str) -> None:
    """Until something is so; fails with the reason after the time."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.3)


@contextlib.contextmanager
def running(
    command: list[str], log: Path, env: dict[str, str], seconds: float = 60
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to a file; ended with SIGTERM, by its id, and all its children with
    it.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        yield process
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        process.send_signal(signal.SIGTERM)
        process.wait(seconds)
        _, alive = psutil.wait_procs(family, timeout=seconds)
        for left in alive:
            left.kill()
        assert not alive, f"left behind: {alive}"
