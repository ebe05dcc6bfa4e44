"""Curves of runs, a panel for each metric and a line for each run:

python -m ppo_dist.study.plot OUT.png LABEL=RUN_FOLDER … [--keys reward/verifiable/mean …]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ppo_dist.config import InputError
from ppo_dist.tracking.local import read_rows

KEYS = ("eval/held_out/sampled_accuracy", "eval/held_out/accuracy", "reward/verifiable/mean")


def plot(out: Path, runs: Sequence[tuple[str, Path]], keys: Sequence[str] = KEYS) -> None:
    """Writes one figure with a panel for each key and a line for each run.

    Raises:
        InputError: a folder has no metrics, or none of them has a key.
    """
    figure, axes = plt.subplots(1, len(keys), figsize=(4.2 * len(keys), 3.4), squeeze=False)
    for number, (label, folder) in enumerate(runs):
        rows = read_rows(folder / "metrics.jsonl")
        if not rows:
            raise InputError(f"{folder}: has no metrics")
        for axis, key in zip(axes[0], keys, strict=True):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if not points:
                raise InputError(f"{folder}: no row has a number for {key}")
            # later lines are thinner, so that equal ones can both be seen
            axis.plot(*zip(*points, strict=True), label=label, linewidth=3.5 / (number + 1))
    for axis, key in zip(axes[0], keys, strict=True):
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


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
