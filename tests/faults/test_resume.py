"""Exact resume: a run that goes on from any of its steps is the run that was never stopped, metric
for metric and weight for weight.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.test_run import numbers
from tests.e2e.test_semi import run, semi
from tests.faults.test_interrupts import resumed_at

pytestmark = pytest.mark.slow
STEPS = 8
WHOLE: dict[Any, Path] = {}  # by what they differ in


def everything(folder: Path, lag: int, **sections: Any) -> dict[str, Any]:
    """All that remembers something: votes, a gate past its warm-up, pseudo-labels, an adaptive μ, a
    guard that acts, a probe, an adaptive KL coefficient, a scale of scores, rollouts under way.

    18 labelled examples, 8 a step: a pass over them ends within the third step, the fifth and the
    seventh. One over the unlabelled prompts is a step long.
    """
    raw = semi(
        folder,
        STEPS,
        train={"steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": 99},
        stream={"max_lag": lag},
        algorithm={
            "kl": {"kind": "reward", "coef": 0.05,
                   "controller": {"kind": "adaptive", "target": 0.01, "horizon": 100}},
            "reward": {"normalise": True},
        },
    )  # fmt: skip
    raw["semi"]["guard"] = {"kl": {"limit": 1e-4, "action": "raise_mu", "patience": 2}}
    for name, section in sections.items():
        raw[name] = {**raw[name], **section}
    return raw


def whole(tmp_path_factory: pytest.TempPathFactory, lag: int, **sections: Any) -> Path:
    """The run that was never stopped; it is made once."""
    key = (lag, repr(sections))
    if key not in WHOLE:
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert run(everything(folder, lag, **sections)) == 0
        WHOLE[key] = folder
    return WHOLE[key]


def cut_off(run: Path, folder: Path, step: int) -> None:
    """What is on disk of a run that was killed after the step's checkpoint."""
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "policy")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)


def assert_same(folder: Path, expected: Path, step: int) -> None:
    assert resumed_at(folder) == [step]
    assert numbers(folder) == numbers(expected)
    samples = [(f / "samples.jsonl").read_text() for f in (folder, expected)]
    assert samples[0] == samples[1]
    one, two = (load_file(f / "policy" / "model.safetensors") for f in (folder, expected))
    assert all(one[name].equal(two[name]) for name in two)


def test_there_is_something_to_remember(tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = numbers(whole(tmp_path_factory, 1))
    last = rows[-1]
    assert last["semi/admitted_share"] and last["pseudo/size"] == 3 and last["pseudo/tokens"]
    assert last["rollout/version_lag"] == 1 and last["reward/scale"] not in (None, 1.0)
    assert any(row["guard/action"] for row in rows)
    assert len({row["semi/mu"] for row in rows}) > 3
    assert len({row["objective/kl_coef"] for row in rows}) > 3
    assert last["pseudo/reward_accuracy_probe"] is not None


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_after_every_step(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, lag: int, step: int
) -> None:
    expected = whole(tmp_path_factory, lag)
    cut_off(expected, tmp_path / "run", step)
    assert run(everything(tmp_path / "run", lag), resume=True) == 0
    assert_same(tmp_path / "run", expected, step)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_with_more_or_fewer_rollout_workers(
    ray_session: None,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    def workers(count: int) -> dict[str, Any]:
        return {"cluster": {"kind": "ray"}, "rollout": {"workers": count}}

    expected = whole(tmp_path_factory, 1, **workers(before))
    for step in (2, 5):
        folder = tmp_path / str(step)
        cut_off(expected, folder, step)
        assert run(everything(folder, 1, **workers(after)), resume=True) == 0
        assert_same(folder, expected, step)
    assert numbers(expected) == numbers(whole(tmp_path_factory, 1)), "nor does Ray matter"
