"""Arguments that argparse alone would take for something else."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from ppo_dist import commands
from ppo_dist.cli import main


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

    monkeypatch.setattr(commands, "train", train)
    assert main(["train", "c.yaml", *(word.format(folder=folder) for word in words)]) == 0
    expected = resume.format(folder=folder) if isinstance(resume, str) else resume
    assert (given[0].resume, given[0].overrides) == (expected, overrides)
