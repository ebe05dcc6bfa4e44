"""The log of a job on this terminal, to the job's end and its exit code."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXIT_CODES = (0, 1, 2, 3, 130)
LAST_WORD = "ppo-dist train: exit code "
PATIENCE_S, PAUSE_S, SILENCE_S = 300.0, 1.0, 120.0
KEPT_CHARACTERS = 2000


def exit_code(driver_exit_code: int | None, message: str | None, log: str) -> int | None:
    """How a run ended: by Ray's record of it, else by Ray's message, else by the last line of the
    log; None if none of them tells.
    """
    if driver_exit_code is not None:
        return driver_exit_code
    told = re.search(r"failed with exit code (-?\d+)", message or "")
    words = [told] if told else list(re.finditer(rf"^{LAST_WORD}(\d+)$", log, re.MULTILINE))
    return int(words[-1][1]) if words else None


@dataclass
class Follower:
    """A job's log on this terminal, to the job's end."""

    client: JobSubmissionClient
    job: str
    address: str
    is_stopping: bool = False
    characters: int = 0
    end: str = ""

    def to_the_end(self) -> int:
        """Prints the log and returns the run's exit code: one of EXIT_CODES, 130 also if the log
        was left with Ctrl-C, and 1 if the server was out of sight for PATIENCE_S.
        """
        while True:
            try:
                return self._follow()
            except KeyboardInterrupt:
                if self.is_stopping or not _wants_to_stop():
                    print()
                    say_how_to_go_on(self.job, self.address)
                    return 130
                self.is_stopping = True
                self._stop()

    def _stop(self) -> None:
        try:
            self.client.stop_job(self.job)
            print("stopping after a checkpoint; Ctrl-C again leaves it alone", flush=True)
        except (OSError, RuntimeError) as error:
            print(f"ppo-dist: {self.job} was not stopped: {error}", file=sys.stderr)

    def _follow(self) -> int:
        import asyncio

        import aiohttp

        seen = time.monotonic()
        while True:
            before = self.characters
            try:
                is_whole = asyncio.run(self._print_log())
                found = self.client.get_job_info(self.job)
                if found.status.is_terminal():
                    if not is_whole:  # now it has an end
                        asyncio.run(self._print_log())
                    return self._ended(found)
                seen = time.monotonic()
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                if self.characters > before:
                    seen = time.monotonic()
                if time.monotonic() - seen > PATIENCE_S:
                    print(f"ppo-dist: lost sight of {self.job}: {error}", file=sys.stderr)
                    say_how_to_go_on(self.job, self.address)
                    return 1
            time.sleep(PAUSE_S)

    async def _print_log(self) -> bool:
        """What was not printed yet; the server begins at the beginning each time. Returns whether
        it came to an end: it also does where nothing comes for SILENCE_S, as by a dead connection.
        """
        import asyncio

        place = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S) as limit:
                async for text in self.client.tail_job_logs(self.job):
                    limit.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                    new = text[max(0, self.characters - place) :]
                    place += len(text)
                    self.characters = max(self.characters, place)
                    self.end = (self.end + new)[-KEPT_CHARACTERS:]
                    print(new, end="", flush=True)
                return True
        return False

    def _ended(self, found: Any) -> int:
        code = exit_code(found.driver_exit_code, found.message, self.end)
        if code in EXIT_CODES:
            return code
        reason = (found.message or "").partition("\n")[0]
        print(f"ppo-dist: {self.job} {found.status.value}: {reason}", file=sys.stderr)
        return 1


def _wants_to_stop() -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input("\nstop the run, after a checkpoint? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def say_how_to_go_on(job: str, address: str) -> None:
    """Ray's own commands for a job that nobody here looks after."""
    for what in ("logs --follow", "stop --no-wait", "status"):
        print(f"  ray job {what} --address {address} {job}", flush=True)
