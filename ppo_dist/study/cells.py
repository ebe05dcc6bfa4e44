"""The cells of a label-efficiency study: what each runs, and what is kept of it.

Another seed means other random numbers and, where questions are generated, another pool of them;
held-out and test questions stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_dist.config import Config, InputError
from ppo_dist.config.load import merged, read, validated
from ppo_dist.config.study import Study
from ppo_dist.files import write_text
from ppo_dist.run import SUMMARY
from ppo_dist.semi.schedule import Scheduled
from ppo_dist.tracking.local import read_rows

POOLS = (
    10**6
)  # between the seeds of two question pools, since question i of seed s is i − 1 of seed s + 1


@dataclass(frozen=True)
class Cell:
    """One training run of a study; `config` is a whole training config without `run.dir`.

    Example: Cell(task="count_bits", method="ours", percent=10, labels=200, seed=0, config={…},
    visits=6.2, cpus=1.0)
    """

    task: str
    method: str
    percent: float
    labels: int
    seed: int
    config: dict[str, Any]
    visits: float
    cpus: float

    @property
    def path(self) -> Path:
        """Where its result is kept, below the study's folder."""
        return Path("cells") / self.task / f"{self.method}-{self.percent:g}-{self.seed}.json"

    @property
    def digest(self) -> str:
        """Of everything that its numbers follow from."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What is kept of a cell. Accuracies are of greedy responses, `curve` is that of the held-out
    set by step. `visits` is how often each unlabelled prompt came.

    Example: Result(task="count_bits", method="ours", percent=10, labels=200, seed=0, accuracy=.98,
    sampled_accuracy=.97, curve=[[0, .0], …], updates=280, visits=6.2, seconds=71.0, digest="…")
    """

    task: str
    method: str
    percent: float
    labels: int
    seed: int
    accuracy: float
    sampled_accuracy: float | None
    curve: list[tuple[int, float]]
    updates: int
    visits: float
    seconds: float
    digest: str


def cells(study: Study, file: Path) -> list[Cell]:
    """All cells of a study, in the order in which they are run: task by task, and all methods for
    one seed before the next.

    Raises:
        InputError: a cell's config is wrong; names the cell.
    """
    return [
        _cell(study, task, name, read(file.parent / method.config, changes), percent, seed)
        for task, changes in study.tasks.items()
        for seed in study.seeds
        for name, method in study.methods.items()
        for percent in method.labels
    ]


def _cell(
    study: Study, task: str, method: str, raw: dict[str, Any], percent: float, seed: int
) -> Cell:
    labels = round(study.pool * percent / 100)
    budget: dict[str, Any] = {"run": {"seed": seed}, "data": {}}
    data = raw.get("data", {})
    for name, part in (
        ("labelled", {"limit": labels}),
        ("unlabelled", {"offset": labels, "limit": study.pool - labels}),
    ):
        source = data.get(name)
        if isinstance(source, dict):
            questions = {"seed": source.get("seed", 0) + POOLS * seed} if "task" in source else {}
            budget["data"][name] = {**part, **questions} if part["limit"] else None
    config = merged(raw, budget)
    name = f"{task}, {method} with {percent:g} % of the labels"
    checked = validated(Config, merged(config, {"run": {"dir": "cell"}}), name)
    if not checked.data.test:
        raise InputError(f"{name}: data.test is empty, so there is nothing to compare by")
    schedule = Scheduled(checked.mix)
    prompts = sum(schedule.plan(s).prompts["unlabelled"] for s in range(checked.train.steps))
    visits = prompts / (study.pool - labels) if labels < study.pool else 0.0
    return Cell(task, method, percent, labels, seed, config, visits, study.cpus)


def run(cell: Cell) -> Result | str:
    """Trains a cell in a process and a folder of its own, which are gone afterwards; or the end of
    its log, if it failed.
    """
    with tempfile.TemporaryDirectory(prefix="ppo_dist-cell-") as scratch:
        folder = Path(scratch) / "run"
        config = merged(cell.config, {"run": {"dir": str(folder)}})
        (Path(scratch) / "cell.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ppo_dist", "train", f"{scratch}/cell.yaml"]
        threads = str(max(1, int(cell.cpus)))
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        if done.returncode or not (folder / SUMMARY).exists():
            return (done.stdout + done.stderr)[-2000:]
        return _result(cell, read_rows(folder / "metrics.jsonl"))


def _result(cell: Cell, rows: list[dict[str, Any]]) -> Result:
    held_out = [(r["step"], r.get("eval/held_out/accuracy")) for r in rows]
    checked = validated(Config, merged(cell.config, {"run": {"dir": "cell"}}), "cell")
    algorithm = checked.algorithm
    return Result(
        *(cell.task, cell.method, cell.percent, cell.labels, cell.seed),
        accuracy=rows[-1]["eval/test/accuracy"],
        sampled_accuracy=rows[-1]["eval/test/sampled_accuracy"],
        curve=[(step, accuracy) for step, accuracy in held_out if accuracy is not None],
        updates=rows[-1]["step"] * algorithm.epochs * algorithm.minibatches,
        visits=round(cell.visits, 2),
        seconds=round(sum(r["timing_s/step"] or 0.0 for r in rows), 1),
        digest=cell.digest,
    )


def finished(folder: Path, cell: Cell) -> Result | None:
    """The kept result of a cell, if it is of the cell as it is now."""
    path = folder / cell.path
    if not path.exists():
        return None
    result = Result(**json.loads(path.read_text()))
    return result if result.digest == cell.digest else None


def keep(folder: Path, cell: Cell, result: Result) -> None:
    """Writes a result, whole or not at all."""
    path = folder / cell.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(result), indent=1) + "\n")
