"""A whole label-efficiency study, small."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.unit.test_study import write


def command(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ppo_dist", "label-efficiency", str(path), *more],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write(tmp_path, tasks={"eight": {}}, wandb="offline")
    first = command(path, "seeds=[0]", "methods.ours.labels=[10]")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 cells, 0 of them finished before" in first.stdout
    folder = tmp_path / "study"
    kept = sorted(p.name for p in folder.glob("cells/eight/*"))
    assert kept == ["ours-10-0.json", "supervised-10-0.json"]
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    # one more method, which fails; the finished cells are not run again
    raw = yaml.safe_load(path.read_text())
    raw["methods"]["broken"] = {"config": "broken.yaml", "labels": [10]}
    path.write_text(yaml.safe_dump(raw))
    (tmp_path / "broken.yaml").write_text(
        "base: ours.yaml\nmodel: {scratch: null, path: no/such}\n"
    )
    second = command(path, "seeds=[0]", "methods.ours.labels=[10]")
    assert second.returncode == 1, second.stdout + second.stderr
    assert "3 cells, 2 of them finished before" in second.stdout
    assert "eight, broken, 5 labels, seed 0: failed" in second.stdout
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(r["method"], r["labels"], r["updates"]) for r in rows] == [
        ("ours", "5", "10"),
        ("supervised", "5", "10"),
    ]
    assert "| labels | 5 (10 %) |" in (folder / "results.md").read_text()
    assert (folder / "accuracy.png").exists() and (folder / "curves.png").exists()


def test_cells_run_as_ray_tasks(ray_session: None) -> None:
    from ppo_dist.cluster.tasks import completed

    assert sorted(completed(lambda letter: letter.upper(), ["a", "b", "c"], cpus=0.5)) == [
        ("a", "A"),
        ("b", "B"),
        ("c", "C"),
    ]


@pytest.mark.parametrize("arguments", [(), ("sede=1",)])
def test_a_wrong_study_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    path = write(tmp_path) if arguments else tmp_path / "no.yaml"
    told = command(path, *arguments)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1 and told.stderr.startswith("ppo-dist: ")
