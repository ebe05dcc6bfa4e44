"""The quick start: one semi-supervised run, its supervised-only control, one table."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_dist import build
from ppo_dist.config import Config, InputError
from ppo_dist.config.base import SupervisedFirst
from ppo_dist.config.load import load
from ppo_dist.run import SUMMARY, is_started, train

CONFIG = "configs/quickstart.yaml"


def main(overrides: Sequence[str]) -> int:
    """Trains what is not trained yet and prints the table. Returns the exit code."""
    console = Console(markup=False)
    try:
        config = load(CONFIG, overrides)
        control = load(CONFIG, [*overrides, *control_overrides(config)])
        with build.cluster(config):
            for title, each in (("semi-supervised", config), ("supervised-only control", control)):
                console.rule(f"{title}: {each.run.dir}")
                begin = time.monotonic()
                code = train(each, is_started(Path(each.run.dir)), console)
                if code:
                    return code
                console.print(f"{time.monotonic() - begin:.0f} s")
    except InputError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    console.print(table(config, _summary(config), _summary(control)))
    return 0


def control_overrides(config: Config) -> list[str]:
    """What makes the control of a run: the same labels and as many updates, no prompts."""
    return [f"run.dir={config.run.dir}-control", "mix.prompts=0", "mix.schedule=1.0"]


def table(config: Config, summary: dict[str, Any], control: dict[str, Any]) -> Table:
    """Held-out greedy accuracy at the points that matter."""
    schedule = config.mix.schedule
    phase = schedule.steps if isinstance(schedule, SupervisedFirst) else 0
    made = Table("held-out greedy accuracy", "step", "accuracy")
    for title, source, step in (
        ("before", summary, 0),
        ("after the supervised part", summary, phase),
        ("end of the semi-supervised run", summary, config.train.steps),
        ("supervised-only control, as many updates", control, config.train.steps),
    ):
        made.add_row(title, str(step), f"{_accuracy(source, step):.1%}")
    return made


def _accuracy(summary: dict[str, Any], step: int) -> float:
    by_step = {row["step"]: row["eval/held_out/accuracy"] for row in summary["evaluations"]}
    return float(by_step.get(step, float("nan")))


def _summary(config: Config) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((Path(config.run.dir) / SUMMARY).read_text())
    return summary


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
