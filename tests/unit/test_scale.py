"""What `ppo-dist scale` asks of a run, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_dist.cli import main
from ppo_dist.config import Config
from ppo_dist.config.load import dump
from ppo_dist.coordinator.scale import SCALE, Scale
from ppo_dist.lock import only_run
from tests.conftest import raw_config
from tests.unit.rig import Rig


def folder_of(tmp_path: Path, **sections: Any) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    sections = {"cluster": {"kind": "ray"}, **sections}
    config = Config.model_validate(raw_config(folder, **sections))
    (folder / "config.yaml").write_text(dump(config))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["scale", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ppo-dist: ") and told.count("\n") == 1
    return told


def test_a_folder_in_which_no_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path)
    assert "no run goes on here" in refused(capsys, str(folder), "--learners", "2")
    assert "no run goes on here" in refused(capsys, str(tmp_path / "none"), "--learners", "2")
    assert not (folder / SCALE).exists()


@pytest.mark.parametrize(
    ("cluster", "words", "message"),
    [
        ({"kind": "local"}, ["--learners", "1"], "cluster.kind: ray and cluster.placement: split"),
        ({"kind": "ray"}, ["--learners", "0"], "learner.workers"),
        ({"kind": "ray"}, ["--rollout-workers", "-1"], "rollout.workers"),
    ],
)
def test_numbers_that_cannot_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    folder = folder_of(tmp_path, cluster=cluster)
    monkeypatch.setattr("ppo_dist.inspect.is_taken", lambda _: True)
    assert message in refused(capsys, str(folder), *words)
    assert not (folder / SCALE).exists()


def test_nothing_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rollout-workers, --learners" in refused(capsys, str(folder_of(tmp_path)))


def test_what_is_asked_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    monkeypatch.setattr("ppo_dist.inspect.is_taken", lambda _: True)
    assert main(["scale", str(folder), "--rollout-workers", "4"]) == 0
    assert main(["scale", str(folder), "--learners", "2"]) == 0
    assert Scale.of(folder) == Scale(rollout_workers=4, learners=2)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"learners": "x"}', '{"more": 1}', '{"learners": 0}']
)
def test_a_file_that_says_nothing_sensible_asks_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / SCALE).write_text(text)
    assert Scale.of(tmp_path) == Scale()


def test_the_loop_asks_the_pool_before_every_step(tmp_path: Path) -> None:
    rig = Rig(tmp_path, train={"steps": 2}, eval={"every": 0})
    Scale(rollout_workers=5).ask(tmp_path)
    assert rig.loop.run() == "done"
    asked = [event for event in rig.pool.events if event.startswith("resize")]  # type: ignore[attr-defined]
    assert asked == ["resize 5"] * 2


def test_a_lock_that_a_run_holds_is_seen(tmp_path: Path) -> None:
    code = "import pathlib, sys; from ppo_dist.lock import is_taken; "
    code += "sys.exit(is_taken(pathlib.Path(sys.argv[1])))"
    ask = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(ask).returncode == 0
    with only_run(tmp_path):
        assert subprocess.run(ask).returncode == 1
    assert subprocess.run(ask).returncode == 0
