"""Curves of runs: `python -m ppo_dist.study.plot OUT.png LABEL=RUN_FOLDER …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ppo_dist.config import InputError
from ppo_dist.tracking.local import read_rows

PANELS = (
    ("held-out accuracy, sampled", "eval/held_out/sampled_accuracy"),
    ("held-out accuracy, greedy", "eval/held_out/accuracy"),
    ("reward of verifiable prompts", "reward/verifiable/mean"),
)


def plot(out: Path, runs: Sequence[tuple[str, Path]]) -> None:
    """Writes one figure with a panel for each of PANELS and a line for each run.

    Raises:
        InputError: a folder has no metrics.
    """
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 3.4), sharey=True)
    for label, folder in runs:
        rows = read_rows(folder / "metrics.jsonl")
        if not rows:
            raise InputError(f"{folder}: has no metrics")
        for axis, (_, key) in zip(axes, PANELS, strict=True):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for axis, (title, _) in zip(axes, PANELS, strict=True):
        axis.set(title=title, xlabel="step", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    pairs = [argument.partition("=") for argument in sys.argv[2:]]
    plot(Path(sys.argv[1]), [(label, Path(folder)) for label, _, folder in pairs])
