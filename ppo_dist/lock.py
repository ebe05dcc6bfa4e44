"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ppo_dist.config import InputError

LOCK = ".lock"
TAKEN = (errno.EAGAIN, errno.EACCES)
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps every other run out of it. The kernel lets go of it when this
    process ends, however it ends; processes that it started do not hold it.

    Raises:
        InputError: another run has it, named by host and process; or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a link in its place must not lead to a file of somebody else's
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(folder / LOCK, flags, 0o644)
    except (OSError, ValueError) as error:
        raise InputError(f"run.dir {folder}: cannot be written: {error}") from None
    with open(descriptor, "r+", encoding="utf-8") as file:
        _take(file.fileno(), folder)
        file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield


def is_taken(folder: Path) -> bool:
    """Whether a run in another process has the folder at this moment."""
    try:
        with (folder / LOCK).open("r+") as file:
            fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in TAKEN
    return False


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            logger.warning("%s: another run is not kept out: %s", folder, error)
            return
        raise InputError(
            f"{folder} is in use by another run ({_holder(folder)}): wait for its end, or choose "
            "another run.dir"
        ) from None


def _holder(folder: Path) -> str:
    time.sleep(0.2)  # who has taken it this moment has yet to write its name
    try:
        told = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"host {told['host']}, process {told['pid']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "it does not tell which"
