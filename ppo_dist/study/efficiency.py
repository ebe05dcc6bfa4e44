"""`ppo-dist label-efficiency`: accuracy against the number of labels, a line a method."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from ppo_dist.config.study import Study
from ppo_dist.study.cells import Cell, Result, cells, finished, keep, run

FAILED = 1


def label_efficiency(study: Study, file: Path, console: Console) -> int:
    """Runs the cells that are not finished, then writes table and figure. Returns the exit code: 0,
    or 1 if cells failed.

    Raises:
        InputError: a cell's config is wrong, or the cluster cannot be joined.
    """
    every = cells(study, file)
    folder = Path(study.dir)
    results = {cell.path: kept for cell in every if (kept := finished(folder, cell)) is not None}
    open_cells = [cell for cell in every if cell.path not in results]
    console.print(f"{len(every)} cells, {len(results)} of them finished before")
    failed, begin = 0, time.monotonic()
    for number, (cell, result) in enumerate(_done(study, open_cells), start=1):
        title = f"{cell.task}, {cell.method}, {cell.labels} labels, seed {cell.seed}"
        left = (time.monotonic() - begin) / number * (len(open_cells) - number)
        if isinstance(result, str):
            failed += 1
            console.print(f"{title}: failed\n{result}", markup=False, highlight=False)
            continue
        keep(folder, cell, result)
        results[cell.path] = result
        console.print(
            f"[{number}/{len(open_cells)}] {title}: {result.accuracy:.1%} "
            f"({result.seconds:.0f} s; {left / 60:.0f} min left)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    ordered = [results[cell.path] for cell in every if cell.path in results]
    if ordered:
        report(study, ordered, console)
    return FAILED if failed else 0


def _done(study: Study, open_cells: Sequence[Cell]) -> Iterator[tuple[Cell, Result | str]]:
    if not open_cells:
        return
    if study.cluster.kind == "local":
        yield from ((cell, run(cell)) for cell in open_cells)
        return
    from ppo_dist.cluster.session import session
    from ppo_dist.cluster.tasks import completed

    with session(study.cluster):
        yield from completed(run, open_cells, study.cpus)


def report(study: Study, results: Sequence[Result], console: Console) -> None:
    """Writes results.csv, results.md and accuracy.png, prints the table, and logs all of it to W&B
    where that is asked for.
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
    for task in _tasks(results):
        console.print(_table(task, results))
    console.print(f"{folder}/results.csv, results.md, accuracy.png", highlight=False)
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
    tasks = _tasks(results)
    chart, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.2), squeeze=False)
    for task, axis in zip(tasks, axes[0], strict=True):
        for number, method in enumerate(_methods(results)):
            points = [
                (labels, _accuracies(task, method, labels, results))
                for _, labels in _budgets(task, results)
            ]
            points = [(labels, found) for labels, found in points if len(found)]
            if not points:
                continue
            x = np.array([labels for labels, _ in points])
            y = np.array([found.mean() for _, found in points])
            spread = np.array([found.std(ddof=1) if len(found) > 1 else 0 for _, found in points])
            color = plt.get_cmap("tab10")(number % 10)
            if len(points) == 1:
                axis.errorbar(x, y, spread, fmt="o", color=color, label=method, capsize=3)
                continue
            axis.plot(x, y, marker="o", color=color, label=method)
            axis.fill_between(x, y - spread, y + spread, color=color, alpha=0.15)
        axis.set(title=task, xlabel="labels", ylabel="test accuracy", xscale="log")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    chart.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(out, dpi=120)
    plt.close(chart)


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
