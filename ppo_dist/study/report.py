"""What a label-efficiency study found: tables and figures."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from ppo_dist.config.study import Study
from ppo_dist.study.cells import Result


def report(study: Study, results: Sequence[Result], console: Console) -> None:
    """Writes results.csv, results.md, accuracy.png and curves.png, prints the table, and logs it to
    W&B where that is asked for.
    """
    folder = Path(study.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as out:
        columns = [name for name in asdict(results[0]) if name not in ("curve", "digest")]
        writer = csv.DictWriter(out, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(asdict, results))
    text = markdown(results)
    (folder / "results.md").write_text(text)
    figure(results, folder / "accuracy.png")
    curves(results, folder / "curves.png")
    for task in _tasks(results):
        console.print(_table(task, results))
    console.print(f"{folder}/results.csv, results.md, accuracy.png, curves.png", highlight=False)
    if study.wandb != "off":
        from ppo_dist.tracking.wandb import log_study

        rows = [{k: v for k, v in asdict(r).items() if k != "curve"} for r in results]
        log_study(study, folder, rows, folder / "accuracy.png")


def markdown(results: Sequence[Result]) -> str:
    """A table a task: methods by budgets, mean ± standard deviation over seeds."""
    parts = []
    for task in _tasks(results):
        budgets = _budgets(task, results)
        head = ["labels", *(f"{labels} ({percent:g} %)" for percent, labels in budgets)]
        lines = [f"**{task}**", "", _line(head), _line(["---"] * len(head))]
        lines += [_line(row) for row in _rows(task, results)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _table(task: str, results: Sequence[Result]) -> Table:
    budgets = _budgets(task, results)
    table = Table("labels", *(f"{labels} ({percent:g} %)" for percent, labels in budgets))
    table.title = f"{task}: greedy accuracy on the test set"
    for row in _rows(task, results):
        table.add_row(*row)
    return table


def _rows(task: str, results: Sequence[Result]) -> list[list[str]]:
    return [
        [method, *(_cell_text(task, method, b, results) for b in _budgets(task, results))]
        for method in _methods(results)
    ]


def _cell_text(task: str, method: str, budget: tuple[float, int], results: Sequence[Result]) -> str:
    found = _accuracies(task, method, budget[1], results)
    if not len(found):
        return ""
    spread = f" ± {100 * found.std(ddof=1):.1f}" if len(found) > 1 else ""
    return f"{100 * found.mean():.1f}{spread}"


def figure(results: Sequence[Result], out: Path) -> None:
    """A panel a task: mean accuracy by number of labels, a line a method, shaded by one standard
    deviation over seeds; a method with one budget is a point.
    """

    def draw(task: str, axis: Any) -> None:
        for number, method in enumerate(_methods(results)):
            by_budget = [
                (labels, _accuracies(task, method, labels, results))
                for _, labels in _budgets(task, results)
            ]
            by_budget = [(labels, found) for labels, found in by_budget if len(found)]
            if len(by_budget) == 1:
                ((labels, found),) = by_budget
                spread = found.std(ddof=1) if len(found) > 1 else 0
                style = {"fmt": "o", "capsize": 3, "label": method}
                axis.errorbar([labels], [found.mean()], [spread], color=_color(number), **style)
            elif by_budget:
                _shaded(axis, by_budget, label=method, color=_color(number), marker="o")
        axis.set(title=task, xlabel="labels", ylabel="test accuracy", xscale="log")

    _panels(results, draw, out)


def curves(results: Sequence[Result], out: Path) -> None:
    """A panel a task: held-out accuracy by step at the budget that most methods have, and dashed at
    the largest one, shaded by one standard deviation over seeds.
    """

    def draw(task: str, axis: Any) -> None:
        of_task = [r for r in results if r.task == task]
        often = Counter(p for p, _ in {(r.percent, r.method) for r in of_task})
        common, largest = max(often, key=lambda p: (often[p], p)), max(often)
        for number, method in enumerate(_methods(results)):
            for percent, line in {common: "-", largest: "--"}.items():
                found = [r for r in of_task if (r.method, r.percent) == (method, percent)]
                if not found:
                    continue
                steps: dict[int, list[float]] = {}
                for step, accuracy in (point for r in found for point in r.curve):
                    steps.setdefault(step, []).append(accuracy)
                points = [(step, np.array(a)) for step, a in sorted(steps.items())]
                label = f"{method}, {percent:g} %"
                _shaded(axis, points, label=label, color=_color(number), linestyle=line)
        axis.set(title=task, xlabel="step", ylabel="held-out accuracy")

    _panels(results, draw, out)


def _shaded(axis: Any, points: Sequence[tuple[int, np.ndarray]], **style: Any) -> None:
    x = np.array([at for at, _ in points])
    y = np.array([found.mean() for _, found in points])
    spread = np.array([found.std(ddof=1) if len(found) > 1 else 0 for _, found in points])
    axis.plot(x, y, **style)
    axis.fill_between(x, y - spread, y + spread, color=style["color"], alpha=0.12)


def _panels(results: Sequence[Result], draw: Callable[[str, Any], None], out: Path) -> None:
    tasks = _tasks(results)
    chart, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.2), squeeze=False)
    for task, axis in zip(tasks, axes[0], strict=True):
        draw(task, axis)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    chart.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(chart)


def _color(number: int) -> Any:
    return plt.get_cmap("tab10")(number % 10)


def _tasks(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.task for r in results))


def _methods(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.method for r in results))


def _budgets(task: str, results: Sequence[Result]) -> list[tuple[float, int]]:
    return sorted({(r.percent, r.labels) for r in results if r.task == task})


def _accuracies(task: str, method: str, labels: int, results: Sequence[Result]) -> np.ndarray:
    return np.array(
        [r.accuracy for r in results if (r.task, r.method, r.labels) == (task, method, labels)]
    )
