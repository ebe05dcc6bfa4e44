"""1 learner and 1 rollout worker, or 2 and 2, at any ZeRO stage: the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_dist.config import Config
from ppo_dist.inspect import export
from ppo_dist.run import train
from tests.conftest import TIMINGS, raw_config

RELATIVE, ABSOLUTE = 1e-4, 1e-6


def run(folder: Path, stage: int, workers: int, **cluster: str) -> tuple[list[Any], list[Any]]:
    """Metrics rows and samples of three mixed steps."""
    raw = raw_config(
        folder,
        learner={"zero_stage": stage, "workers": workers},
        rollout={"workers": workers},
        cluster={"kind": "ray", **cluster},
        tracking={"samples": 1000},
    )
    assert train(Config.model_validate(raw), resume=False, console=Console(quiet=True)) == 0
    export(sorted((folder / "checkpoints").iterdir())[-1], folder / "out")
    whole, exported = ((folder / of / "model.safetensors").read_bytes() for of in ("policy", "out"))
    assert whole == exported, "all learners' shards together are the policy"

    def read(name: str) -> list[Any]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    return read("metrics.jsonl"), read("samples.jsonl")


def assert_same(rows: list[Any], expected: list[Any]) -> None:
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        for key, value in other.items():
            if key.startswith(TIMINGS):
                continue
            if value is None:
                assert row[key] is None, key
            else:
                assert row[key] == pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE), (
                    row["step"],
                    key,
                )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """The run in one process."""
    return run(tmp_path_factory.mktemp("local") / "run", stage=1, workers=1, kind="local")


@pytest.mark.parametrize(
    ("stage", "workers", "placement"),
    [(3, 2, "split")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (3, 2, "colocated"),
            *((s, 2, "split") for s in range(3)),
            (2, 2, "colocated"),
            *((s, 1, "split") for s in range(4)),
        )
    ],  # colocated learners sleep while others generate
)
def test_layouts_give_the_same_run(
    ray_session: None,
    tmp_path: Path,
    expected: tuple[list[Any], list[Any]],
    stage: int,
    workers: int,
    placement: str,
) -> None:
    rows, samples = run(tmp_path / "run", stage, workers, placement=placement)
    assert_same(rows, expected[0])
    # rollouts token for token: the text decides the reward, and lengths are in the metrics
    key = ("step", "uid", "prompt", "response", "reward", "finish", "version")
    assert [[s[k] for k in key] for s in samples] == [[s[k] for k in key] for s in expected[1]]
    assert len(samples) > 3 * 12
