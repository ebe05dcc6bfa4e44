"""Processes that end with the one that owns them, however that ends: of vLLM's, those of a worker
that was killed would stay, with all the memory that the worker in its place needs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import psutil

OWNER = "PPO_DIST_OWNER"  # inherited by all processes that this one starts
POLL_S = 1.0


def own_processes() -> None:
    """What this process starts from now on may call `end_with_owner`."""
    os.environ[OWNER] = str(os.getpid())


def end_with_owner() -> None:
    """Ends this process a second after its owner is gone; nothing, if it has none."""
    owner = int(os.environ.get(OWNER, os.getpid()))
    if owner != os.getpid():
        thread = threading.Thread(target=_follow, args=(owner,), daemon=True, name="owner")
        thread.start()


def _follow(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        owner = psutil.Process(pid)
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL_S)
    os._exit(1)
