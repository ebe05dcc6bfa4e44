"""Numbers that are none, wherever they come from: told by name, and never learned from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from ppo_dist.config import Config, RunError
from ppo_dist.protocols import WeightsError
from ppo_dist.rewards.rules import ByOrigin, WeightedSum
from ppo_dist.run import train
from ppo_dist.tracking.local import read_rows
from ppo_dist.transport.memory import MemoryReceiver
from ppo_dist.transport.wire import finite
from ppo_dist.types import Rollout, Score
from tests.conftest import raw_config
from tests.fakes import FakeReward
from tests.unit.rig import Rig
from tests.unit.test_rewards import rollout


class Says:
    """A RewardSource that gives what it was told to give."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def score(self, rollouts: list[Rollout]) -> list[Score]:
        return [Score(value, "model") for value, _ in zip(self.values, rollouts, strict=False)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_ends_the_run_by_name(value: float) -> None:
    source = ByOrigin({"verifiable": Says(0.5, value)})  # type: ignore[dict-item]
    with pytest.raises(RunError, match=rf"reward model gave {value} to v/0:9, response 'said': "):
        source.score([rollout("fine"), rollout("said", uid="v/0:9")])


def test_a_sum_that_overflows_does_too() -> None:
    for weights in ((1e308, 1e308), (1e308, -1e308)):
        parts = [(weight, Says(1e308)) for weight in weights]
        with pytest.raises(RunError, match=r"reward model\+model gave (inf|nan)"):
            ByOrigin({"verifiable": WeightedSum(parts)}).score([rollout("said")])  # type: ignore[dict-item, arg-type]


def test_what_counts_as_0_since_it_failed_is_told(tmp_path: Path) -> None:
    class Failing(FakeReward):
        def score(self, rollouts: list[Rollout]) -> list[Score]:
            faults = ["returned nan", *[None] * (len(rollouts) - 1)]
            return [Score(0.0, "function", fault) for fault in faults]

    rig = Rig(tmp_path, train={"steps": 1}, eval={"every": 0})
    rig.loop._parts = type(rig.loop._parts)(**{**vars(rig.loop._parts), "reward": Failing()})
    assert rig.loop.run() == "done"
    ((step, title, text),) = rig.tracker.alerts
    assert step == 1 and title == "1 of 12 responses could not be judged and count as 0"
    assert "the first: reward function, " in text and "returned nan" in text
    assert rig.tracker.rows[-1]["reward/faults"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights(dtype: torch.dtype) -> None:
    good = [("a", torch.ones(3, dtype=dtype)), ("large", torch.full((9,), 3e38, dtype=dtype))]
    assert [name for name, _ in finite(7, good)] == ["a", "large"], "its sum is not a fault"
    for value in (math.nan, math.inf):
        bad = torch.ones(3, dtype=dtype)
        bad[1] = value
        with pytest.raises(WeightsError, match="version 7: b is not finite"):
            list(finite(7, [*good, ("b", bad)]))


def run(folder: Path, **sections: Any) -> int:
    raw = raw_config(folder, **{"train": {"steps": 3, "checkpoint_every": 1}, **sections})
    return train(Config.model_validate(raw), False, Console(quiet=True))


def test_weights_that_are_received_are_never_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a digest does not notice: the learners themselves hold something that is no number."""
    fetch = MemoryReceiver.fetch

    def spoiled(self: MemoryReceiver, weights: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in fetch(self, weights):
            is_it = weights.version == 1 and name.endswith("wte.weight")
            yield name, torch.full_like(tensor, math.nan) if is_it else tensor

    monkeypatch.setattr(MemoryReceiver, "fetch", spoiled)
    with pytest.raises(RunError, match=r"rollout workers: version 1: .*wte\.weight is not finite"):
        run(tmp_path)
    (failed,) = [e for e in read_rows(tmp_path / "events.jsonl") if e["event"] == "failed"]
    assert "wte.weight is not finite" in failed["reason"]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]


FUNCTION = """
import math
calls = 0
def score(prompt, response, answer):
    global calls
    calls += 1
    return {value} if calls == 3 else 0.5
"""


@pytest.mark.slow
@pytest.mark.parametrize(("value", "said"), [("math.nan", "nan"), ("-math.inf", "-inf")])
@pytest.mark.parametrize("on_error", ["zero", "error"])
def test_a_function_of_the_users(tmp_path: Path, value: str, said: str, on_error: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTION.format(value=value))
    function = {"kind": "function", "path": str(file), "name": "score"}
    reward = {"verifiable": function, "on_error": on_error}
    if on_error == "error":
        from ppo_dist.config import InputError

        with pytest.raises(InputError, match=rf"reward function failed on .*: returned {said}"):
            run(tmp_path / "run", reward=reward)
        return
    assert run(tmp_path / "run", reward=reward) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["reward/faults"] or 0 for row in rows) == 1
    (alert,) = [e for e in read_rows(tmp_path / "run" / "events.jsonl") if e["event"] == "alert"]
    assert "reward function, " in alert["text"] and f"returned {said}" in alert["text"]


@pytest.mark.slow
def test_huge_scores_are_skipped_and_kept(tmp_path: Path) -> None:
    """Finite, and yet advantages overflow: no step is made, the sequences are kept."""
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, response, answer):\n    return 1e200 * len(response)\n")
    function = {"kind": "function", "path": str(file), "name": "score"}
    code = run(tmp_path / "run", reward={"verifiable": function}, mix={"schedule": 0.0})
    assert code == 3
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["guard/skipped_updates"] or 0 for row in rows) >= 3
    kept = sorted((tmp_path / "run" / "skipped").iterdir())
    with np.load(kept[0], allow_pickle=False) as columns:
        wrong = {name for name in columns.files if name.split("/")[-1] == "returns_R"}
        assert wrong and any(not np.isfinite(columns[name]).all() for name in wrong)
