"""Reward models as Ray actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from ppo_dist import build
from ppo_dist.cluster import judges
from ppo_dist.config import Config, RunError
from tests.conftest import raw_config
from tests.unit.test_reward_model import classifier, rollouts, scores_of


def test_two_workers_give_what_one_process_gives(
    ray_session: None,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_models["llama"]
    path = classifier(tmp_path / "rm", base)
    expected = scores_of(path, base).score(rollouts(base))
    model = {"kind": "model", "path": str(path), "workers": 2, "batch_tokens": 16}
    raw = raw_config(tmp_path, reward={"verifiable": model}, cluster={"kind": "ray", "restarts": 1})
    raw["train"]["profile_steps"] = 1
    made: list[judges.Judges] = []
    start = judges.Judges.__init__

    def started(self: judges.Judges, *args: object) -> None:
        start(self, *args)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(judges.Judges, "__init__", started)
    with build.rollout_pool(Config.model_validate(raw), str(base)) as (_, source):
        found = source.score(rollouts(base))
        assert [s.value for s in found] == pytest.approx([s.value for s in expected], abs=1e-5)
        (own,) = made
        assert len(own._actors) == 2
        told = source.vitals()
        assert [*told] == [0, 1] and all(each.busy_s > 0 and each.memory for each in told.values())
        ray.kill(own._actors[1])
        assert source.score(rollouts(base)) == found, "it is asked again in its new process"
        traces = [file.name for file in (tmp_path / "profile").iterdir()]
        assert traces == ["reward-0-1.json"], "the new process has had one call"
        ray.kill(own._actors[1])
        with pytest.raises(RunError, match=r"the reward model .*rm failed"):
            source.score(rollouts(base))
    failed, restarted, again = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert failed["event"] == again["event"] == "reward_worker_failed" and failed["worker"] == 1
    assert restarted["event"] == "reward_worker_restarted" and restarted["seconds"] < 60
