"""Label-efficiency studies: which cells there are, what is kept of them, table and figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from ppo_dist.config import InputError
from ppo_dist.config.load import load_study
from ppo_dist.study import cells as study_cells
from ppo_dist.study import plot, report
from ppo_dist.study.cells import Result, cells, finished, keep
from ppo_dist.study.report import markdown
from tests.conftest import raw_config


def write(folder: Path, **changes: Any) -> Path:
    """A study of two methods on one task; the second method differs from the first by one key."""
    raw = raw_config(folder / "unused", train={"steps": 5})
    words = {**raw["data"]["labelled"], "size": 50}
    raw["data"] = {
        "labelled": words,
        "unlabelled": words,
        "test": {**words, "size": 8, "seed": 4, "split": "held_out"},
    }
    raw["reward"] = {"labelled": "exact", "unlabelled": "vote"}
    raw["mix"] |= {"prompts": 20, "shares": {"unlabelled": 0.9, "labelled": 0.1, "verifiable": 0}}
    (folder / "ours.yaml").write_text(yaml.safe_dump(raw))
    (folder / "supervised.yaml").write_text(
        yaml.safe_dump({"base": "ours.yaml", "mix": {"prompts": 0}, "data": {"unlabelled": None}})
    )
    study = {
        "dir": str(folder / "study"),
        "pool": 50,
        "seeds": [0, 1],
        "tasks": {"four": {"data": {"test": {"size": 4}}}, "eight": {}},
        "methods": {
            "ours": {"config": "ours.yaml", "labels": [10, 20]},
            "supervised": {"config": "supervised.yaml", "labels": [10]},
        },
        "cluster": {"kind": "local"},
        **changes,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def test_the_cells_of_a_study(tmp_path: Path) -> None:
    path = write(tmp_path)
    made = cells(load_study(path), path)
    assert [str(c.path) for c in made[:4]] == [
        "cells/four/ours-10-0.json",
        "cells/four/ours-20-0.json",
        "cells/four/supervised-10-0.json",
        "cells/four/ours-10-1.json",
    ]
    assert len(made) == 12 and len({c.digest for c in made}) == 12
    few, more, supervised = made[:3]
    assert few.labels == 5 and few.config["run"]["seed"] == 0
    assert few.config["data"]["labelled"]["limit"] == 5
    assert (few.config["data"]["unlabelled"]["offset"], few.config["data"]["test"]["size"]) == (
        5,
        4,
    )
    assert few.visits == pytest.approx(5 * 18 / 45)
    assert more.labels == 10 and more.visits == pytest.approx(5 * 18 / 40)
    assert supervised.config["data"]["unlabelled"] is None
    assert supervised.config["mix"] == {**few.config["mix"], "prompts": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pool": 3}, r"methods.ours.labels: 10.0 % of 3 is none"),
        ({"sede": [1]}, r"study.yaml: sede: unknown key; did you mean seeds\?"),
        ({"seeds": []}, r"study.yaml: seeds: "),
        ({"tasks": {"x": {"mix": {"promts": 3}}}}, "x, ours with 10 % of the labels: mix.promts"),
        ({"tasks": {"x": {"data": {"test": []}}}}, "data.test is empty"),
        (
            {"methods": {"a": {"config": "ours.yaml", "labels": [100]}}},
            "a with 100 % of the labels: mix.shares.unlabelled is above 0, but data.unlabelled is",
        ),
        ({"methods": {"a": {"config": "no.yaml", "labels": [5]}}}, r"no.yaml: cannot be read"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        cells(load_study(path), path)


def test_bases_are_files_below_and_go_not_in_circles(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "ours.yaml").write_text("base: supervised.yaml\n")
    with pytest.raises(InputError, match="is its own base"):
        cells(load_study(path), path)
    (tmp_path / "ours.yaml").write_text("base: {a: b}\n")
    with pytest.raises(InputError, match="base must be the path of another config"):
        cells(load_study(path), path)


def result(method: str, labels: int, seed: int, accuracy: float, task: str = "t") -> Result:
    return Result(task, method, labels / 10, labels, seed, accuracy, None, [], 8, 6.0, 1.0, "d")


def test_results_are_kept_until_the_cell_changes(tmp_path: Path) -> None:
    path = write(tmp_path)
    cell = cells(load_study(path), path)[0]
    assert finished(tmp_path, cell) is None
    mine = replace(result("ours", 5, 0, 0.5), digest=cell.digest, curve=[(0, 0.25)])
    keep(tmp_path, cell, mine)
    kept = finished(tmp_path, cell)
    assert (
        kept is not None and kept.accuracy == 0.5 and [tuple(p) for p in kept.curve] == [(0, 0.25)]
    )
    other = replace(cell, config={**cell.config, "train": {"steps": 6}})
    assert other.path == cell.path and finished(tmp_path, other) is None


RESULTS = [
    result("ours", 20, 0, 0.5),
    result("ours", 20, 1, 0.7),
    result("ours", 200, 0, 0.9),
    result("vote", 200, 0, 0.25),
]


def test_the_table_has_means_and_deviations() -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == "**t**" and lines[2] == "| labels | 20 (2 %) | 200 (20 %) |"
    assert lines[4:] == ["| ours | 60.0 ± 14.1 | 90.0 |", "| vote |  | 25.0 |"]


def test_the_figures_show_means_by_labels_and_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    report.figure([*RESULTS, result("ours", 20, 0, 0.4, "u")], tmp_path / "sub" / "a.png")
    one, other = drawn[0].axes
    (line, *_) = one.get_lines()
    assert line.get_label() == "ours" and list(line.get_xdata()) == [20, 200]
    assert list(line.get_ydata()) == pytest.approx([0.6, 0.9])
    assert [a.get_title() for a in (one, other)] == ["t", "u"]
    assert (tmp_path / "sub" / "a.png").read_bytes()[:4] == b"\x89PNG"

    curved = [
        replace(r, curve=[(0, 0.0), (10, r.accuracy)])
        for r in (*RESULTS, result("vote", 1000, 0, 0.8))
    ]
    report.curves(curved, tmp_path / "b.png")
    lines = {line.get_label(): line for line in drawn[1].axes[0].get_lines()}
    assert set(lines) == {"ours, 20 %", "vote, 20 %", "vote, 100 %"}, "ours at 2 % is left out"
    assert list(lines["vote, 100 %"].get_ydata()) == [0.0, 0.8]
    assert [lines[name].get_linestyle() for name in ("ours, 20 %", "vote, 100 %")] == ["-", "--"]


def test_curves_of_runs_that_share_a_label_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, values in enumerate(([0.0, 1.0, 2.0], [2.0, 3.0], [7.0, 7.0])):
        (tmp_path / str(number)).mkdir()
        rows = [json.dumps({"step": n, "x": value}) for n, value in enumerate(values)]
        (tmp_path / str(number) / "metrics.jsonl").write_text("\n".join(rows))
    drawn: dict[str, Any] = {}

    def note(figure: Figure, *args: Any, **kwargs: Any) -> None:
        (axis,) = figure.axes
        drawn.update({line.get_label(): line.get_xydata().tolist() for line in axis.lines})
        drawn["shades"] = len(axis.collections)

    monkeypatch.setattr(Figure, "savefig", note)
    runs = [f"one={tmp_path}/0", f"one={tmp_path}/1", f"two={tmp_path}/2"]
    assert plot.main([str(tmp_path / "out.png"), *runs, "--keys", "x"]) == 0
    assert drawn == {"one": [[0, 1], [1, 2]], "two": [[0, 7], [1, 7]], "shades": 1}
    assert plot.main([str(tmp_path / "out.png"), *runs, "--keys", "y"]) == 2


def test_a_cell_that_fails_gives_the_end_of_its_log(tmp_path: Path) -> None:
    path = write(tmp_path)
    cell = cells(load_study(path), path)[0]
    broken = replace(cell, config={**cell.config, "model": {"path": "no/such"}})
    said = study_cells.run(broken)
    assert isinstance(said, str) and "no/such: no such model folder" in said
