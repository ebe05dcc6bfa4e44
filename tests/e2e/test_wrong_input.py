"""Whatever is wrong with what a user gives: one clear line, exit code 2, soon, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import raw_config

LABELLED = {"prompt": "ab>", "response": "ba"}
LIMIT_S = 10  # on a quiet machine these take 1 to 3 s


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ppo_dist", *map(str, arguments)], capture_output=True, text=True
    )


def written(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(LABELLED) for _ in range(3)))
    raw = raw_config(folder / "run", mix={"prompts": 0})
    raw["data"] = {"labelled": str(folder / "labels.jsonl")}
    change(raw)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def put(section: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw[section].update({key: value})


def data_file(name: str, content: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        path = Path(raw["run"]["dir"]).parent / name
        path.write_text(content)
        raw["data"]["labelled"] = str(path)

    return change


def model_folder(name: str, file: str | None) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        path = Path(raw["run"]["dir"]).parent / name
        if file is not None:
            path.mkdir()
            (path / file).write_text("{}")
        raw["model"] = {"path": str(path)}

    return change


GOOD = json.dumps(LABELLED)
CASES: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "unknown key": (put("rollout", "wokers", 2), ["rollout.wokers", "rollout.workers"]),
    "wrong type": (put("train", "steps", "ten"), ["train.steps", "integer", "ten"]),
    "missing file": (put("data", "labelled", "nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    "malformed row": (
        data_file("bad.jsonl", f"{GOOD}\n{{'prompt': 1}}\n"),
        ["bad.jsonl, line 2", "not valid JSON"],
    ),
    "no response": (
        data_file("bare.jsonl", f'{GOOD}\n{GOOD}\n{{"prompt": "x"}}\n'),
        ["bare.jsonl, line 3", "'response'"],
    ),
    "empty data": (data_file("empty.jsonl", "\n"), ["empty.jsonl", "no rows"]),
    "no model folder": (model_folder("nothing", None), ["nothing", "no such model folder"]),
    "not a model folder": (model_folder("notes", "readme.md"), ["notes", "no config.json"]),
    "no weights": (model_folder("half", "config.json"), ["half", "safetensors"]),
}


FAST = ("unknown key", "wrong type", "missing file", "no weights")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES],
)
def test_one_clear_line(tmp_path: Path, name: str) -> None:
    change, words = CASES[name]
    config = written(tmp_path, change)
    begin = time.monotonic()
    result = command("train", config)
    seconds = time.monotonic() - begin
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]
    assert seconds < LIMIT_S
    assert not (tmp_path / "run").exists(), "nothing is written before all is checked"


def test_missing_config_and_bad_override(tmp_path: Path) -> None:
    result = command("train", tmp_path / "nowhere.yaml")
    assert result.returncode == 2 and "nowhere.yaml: cannot be read" in result.stderr
    config = written(tmp_path, lambda raw: None)
    result = command("train", config, "train.steps")
    assert result.returncode == 2 and "key.sub=value" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "learner", "words"),
    [
        ({"device": "cuda"}, {}, ["2 GPUs asked for, 0 found"]),
        ({"cpus": 2}, {"workers": 64}, ["65 CPUs asked for, 2 found"]),
    ],
)
def test_more_than_the_cluster_has(
    tmp_path: Path, cluster: dict[str, Any], learner: dict[str, Any], words: list[str]
) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["cluster"] = {"kind": "ray", **cluster}
        raw["learner"].update(learner)

    config = written(tmp_path, change)
    begin = time.monotonic()
    result = command("train", config)
    seconds = time.monotonic() - begin
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words)
    assert seconds < 30
