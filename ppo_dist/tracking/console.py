"""The terminal: a live line while a run goes on, plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 10.0


class Terminal:
    """A Tracker that shows step, reward, KL, tokens/s and time left."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console, self._total = console, total
        self._begin, self._done_before, self._last = time.monotonic(), done, 0.0
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, line="")
        if console.is_terminal:
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """See Tracker."""
        line = describe(metrics)
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step, line=line)
            return
        now = time.monotonic()
        evaluated = metrics.get("eval/held_out/accuracy") is not None
        if evaluated or step == self._total or now - self._last > PLAIN_EVERY_S:
            self._last = now
            per_step = (now - self._begin) / max(step - self._done_before, 1)
            left = f"  {per_step * (self._total - step):.0f} s left" if step else ""
            self._console.print(
                f"step {step}/{self._total}  {line}{left}", highlight=False, soft_wrap=True
            )

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples are not shown."""

    def alert(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        text = f"step {step}: {title}; {text}"
        self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    def close(self) -> None:
        """See Tracker."""
        if self._console.is_terminal:
            self._progress.stop()


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How a run went: its first and last evaluation, its best, and what it took, out of its metrics
    rows.
    """
    evaluated = [row for row in rows if row.get("eval/held_out/accuracy") is not None]
    table = Table("held-out set", "step", "greedy accuracy", "sampled accuracy")
    if evaluated:
        best = max(evaluated, key=lambda row: row["eval/held_out/accuracy"])
        for title, row in (("first", evaluated[0]), ("best", best), ("last", evaluated[-1])):
            sampled = row["eval/held_out/sampled_accuracy"]
            table.add_row(
                title,
                str(row["step"]),
                f"{row['eval/held_out/accuracy']:.1%}",
                "–" if sampled is None else f"{sampled:.1%}",
            )
    seconds = sum(row["timing_s/step"] or 0.0 for row in rows)
    responses = sum(row["rollout/tokens"] or 0.0 for row in rows)
    labelled = sum(row["sup/tokens"] or 0.0 for row in rows)
    table.caption = (
        f"{rows[-1]['step']} steps in {seconds:.0f} s: {responses:.0f} tokens written, "
        f"{labelled:.0f} labelled tokens learned"
    )
    return table


def describe(metrics: Mapping[str, float | None]) -> str:
    """One line out of a metrics row; what it has no number for is left out."""
    shown = [
        (
            "reward",
            _first(
                metrics, "reward/verifiable/mean", "reward/unlabelled/mean", "reward/labelled/mean"
            ),
            ".3f",
        ),
        ("sup", metrics.get("sup/loss"), ".3f"),
        ("KL", metrics.get("objective/kl"), ".3f"),
        ("tokens/s", metrics.get("perf/tokens_per_s"), ".0f"),
        ("held-out", metrics.get("eval/held_out/accuracy"), ".1%"),
    ]
    return "  ".join(f"{name} {value:{form}}" for name, value, form in shown if value is not None)


def _first(metrics: Mapping[str, float | None], *names: str) -> float | None:
    return next((metrics[name] for name in names if metrics.get(name) is not None), None)


class Several:
    """A Tracker that passes everything on to others."""

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.table(step, rows)

    def alert(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.alert(step, title, text)

    def close(self) -> None:
        """See Tracker."""
        with contextlib.ExitStack() as stack:  # one that fails must not keep the others open
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close)


class Losable:
    """A Tracker that does without another one that failed, so that the run goes on. W&B's own
    process, for one, ends at the signal that stops a Ray job, before the run has its checkpoint.
    """

    def __init__(self, make: Callable[[], Any], tell: Callable[[Exception], None]) -> None:
        """`make` makes the other one, which may fail as well."""
        self._tracker: Any = None
        self._tell, self._is_lost = tell, False
        self._try(lambda: setattr(self, "_tracker", make()))

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """See Tracker."""
        self._try(lambda: self._tracker.log(step, metrics))

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker."""
        self._try(lambda: self._tracker.table(step, rows))

    def alert(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        self._try(lambda: self._tracker.alert(step, title, text))

    def close(self) -> None:
        """See Tracker."""
        self._try(lambda: self._tracker.close())

    def _try(self, action: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except Exception as error:  # of many kinds, most of them private to W&B
            self._is_lost = True
            self._tell(error)
