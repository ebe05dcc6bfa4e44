"""Curves of runs, a panel for each metric and a line for each label: the mean of its runs, within
the range that they span:

python -m ppo_dist.study.plot OUT.png LABEL=RUN_FOLDER … [--keys reward/verifiable/mean …]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ppo_dist.config import InputError
from ppo_dist.tracking.local import read_rows

KEYS = ("eval/held_out/sampled_accuracy", "eval/held_out/accuracy", "reward/verifiable/mean")


def plot(out: Path, runs: Sequence[tuple[str, Path]], keys: Sequence[str] = KEYS) -> None:
    """Writes one figure with a panel for each key and a line for each label, over the steps that
    all its runs have.

    Raises:
        InputError: a folder has no metrics, or none of them has a key.
    """
    figure, axes = plt.subplots(1, len(keys), figsize=(4.2 * len(keys), 3.4), squeeze=False)
    for number, label in enumerate(dict.fromkeys(name for name, _ in runs)):
        folders = [folder for name, folder in runs if name == label]
        for axis, key in zip(axes[0], keys, strict=True):
            curves = [_curve(folder, key) for folder in folders]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            columns = [[curve[step] for curve in curves] for step in steps]
            # later lines are thinner, so that equal ones can both be seen
            width = 3.5 / (number + 1)
            (line,) = axis.plot(steps, [mean(c) for c in columns], label=label, linewidth=width)
            if len(folders) > 1:
                bounds = [min(c) for c in columns], [max(c) for c in columns]
                axis.fill_between(steps, *bounds, alpha=0.2, color=line.get_color())
    for axis, key in zip(axes[0], keys, strict=True):
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _curve(folder: Path, key: str) -> dict[int, float]:
    """A metric by step."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise InputError(f"{folder}: has no metrics")
    points = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    if not points:
        raise InputError(f"{folder}: no row has a number for {key}")
    return points


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ppo_dist.study.plot", description=__doc__)
    parser.add_argument("out", type=Path, help="the figure to write")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_FOLDER")
    parser.add_argument("--keys", nargs="+", default=KEYS, help="metrics, a panel each")
    arguments = parser.parse_args(argv)
    pairs = [run.rpartition("=") for run in arguments.runs]
    try:
        plot(arguments.out, [(name, Path(folder)) for name, _, folder in pairs], arguments.keys)
    except InputError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
