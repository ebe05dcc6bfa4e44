"""Arguments that argparse alone would take for something else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from ppo_dist import commands as do
from ppo_dist.cli import _parser, main

LINES = 40  # a screen


def commands() -> list[str]:
    """All that `ppo-dist` knows."""
    [of_commands] = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return list(of_commands.choices)


@pytest.mark.parametrize("name", ["", *commands()])
def test_help_fits_a_screen_and_has_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"] if name else ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"example: ppo-dist {name}" in said
    assert said.count("\n") < LINES


@pytest.mark.parametrize(
    ("words", "resume", "overrides"),
    [
        (["train.steps=9"], False, ["train.steps=9"]),
        (["--resume"], True, []),
        (["--resume", "train.steps=9"], True, ["train.steps=9"]),
        (["--resume", "a.b=1", "c.d=2"], True, ["a.b=1", "c.d=2"]),
        (["a.b=1", "--resume", "c.d=2"], True, ["c.d=2", "a.b=1"]),
        (["--resume", "runs/a/checkpoints/step-1"], "runs/a/checkpoints/step-1", []),
        (["--resume", "{folder}", "a.b=1"], "{folder}", ["a.b=1"]),
    ],
)
def test_an_override_after_resume_is_one(
    words: list[str], resume: bool | str, overrides: list[str],
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "lr=1"  # a checkpoint that looks like an override
    folder.mkdir()
    given: list[argparse.Namespace] = []

    def train(arguments: argparse.Namespace) -> int:
        given.append(arguments)
        return 0

    monkeypatch.setattr(do, "train", train)
    assert main(["train", "c.yaml", *(word.format(folder=folder) for word in words)]) == 0
    expected = resume.format(folder=folder) if isinstance(resume, str) else resume
    assert (given[0].resume, given[0].overrides) == (expected, overrides)


@pytest.mark.parametrize(
    ("words", "place", "said"),
    [
        (["fetch", "smollm2-135m"], "there", "exists already"),
        (["export", "checkpoint"], "there", "exists already"),
        (["export", "checkpoint"], "file/out", "file cannot be written to"),
        (["dashboard", "configs/quickstart.yaml", "--out"], "there", "is a folder"),
        (["dashboard", "c.yaml", "--out"], "file/a/b.json", "file cannot be written to"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_done(
    words: list[str], place: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    try:
        code: Any = main([*words, str(tmp_path / place)])
    except SystemExit as ended:  # argparse's
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err
