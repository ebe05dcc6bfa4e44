"""`ppo-dist label-efficiency`: runs what is not finished yet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ppo_dist.config.study import Study
from ppo_dist.study.cells import Cell, Result, cells, finished, keep, run
from ppo_dist.study.report import report

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
