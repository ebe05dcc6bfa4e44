"""Cases by the thousand, and a watch over what they do: no process, no connection, and no change to
the disk but where it was told to.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from ppo_dist.config import InputError

REACHES_OUT = ("os.system", "os.exec", "os.fork", "subprocess.Popen", "socket.connect")
# changes to the disk: which of their arguments are paths, and which the folders that these start in
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
}
CACHES = {".hypothesis", "__pycache__"}  # Hypothesis's and Python's own
watched: list[Path] = []  # where a test may write, while one is watched
violations: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not watched:
        return
    if event in REACHES_OUT:
        violations.append(f"{event} {arguments[:1]}")
    for path, start in CHANGES.get(event, ()):
        within = -1 if start is None else arguments[start]
        if isinstance(arguments[path], int) or _is_changed_inside(arguments[path], within):
            continue
        violations.append(f"{event} {arguments[path]!r}")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = any(c in (mode or "") for c in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
        if writes and not _is_allowed(path):
            violations.append(f"open {path!r}")


def _is_allowed(path: Any) -> bool:
    name = Path(os.path.realpath(os.fsdecode(path)))
    is_cache = not CACHES.isdisjoint(name.parts)
    return is_cache or any(name.is_relative_to(folder) for folder in (*watched, "/dev"))


def _is_changed_inside(path: Any, within: int) -> bool:
    """A link goes, not what it leads to. `within` is the descriptor of the folder that a relative
    path starts in, if it has one.
    """
    start = f"/proc/self/fd/{within}" if within >= 0 else ""
    whole = os.path.join(start, os.fsdecode(path))
    return os.path.basename(whole) in CACHES or _is_allowed(os.path.dirname(whole))


sys.addaudithook(_audit)


@contextlib.contextmanager
def only_in(folder: Path) -> Iterator[None]:
    gc.collect()  # folders that tests before left to the collector go now
    violations.clear()
    watched.append(folder.resolve())
    try:
        yield
    finally:
        watched.clear()
    assert violations == [], violations[:9]


def fuzz(count: int, check: Callable[..., None], *given_to: Any, deadline_s: float = 20) -> None:
    """Tries a check with that many cases, the same each time. One that hangs ends the process, with
    where it does.
    """

    @functools.wraps(check)
    def watched_over(*case: Any, **named: Any) -> None:
        faulthandler.dump_traceback_later(5 * deadline_s, exit=True)
        try:
            check(*case, **named)
        finally:
            faulthandler.cancel_dump_traceback_later()

    chosen = settings(
        max_examples=count,
        deadline=int(deadline_s * 1000),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(*given_to)(watched_over))()


def sizes(fast: int, slow: int) -> Any:
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def refused(error: InputError) -> None:
    message = str(error)
    assert message and "\n" not in message and len(message) < 20_000
