"""The contracts of the seams (ppo_dist/protocols.py), as functions that any implementation can be
put through.

To check your own reward, engine, schedule or transport, call the function of its protocol from a
test:

    from tests.contract.suites import check_reward_source
    def test_mine():
        check_reward_source(MyReward(), rollouts)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch

from ppo_dist.config.base import ORIGINS
from ppo_dist.protocols import (
    MixSchedule,
    NamedTensors,
    RewardSource,
    RolloutEngine,
    Tracker,
    WeightReceiver,
    WeightSender,
)
from ppo_dist.types import Chunk, Rollout


def check_rollout_engine(
    engine: RolloutEngine, weights: NamedTensors, chunks: Sequence[Chunk]
) -> None:
    """`chunks` ask for version 5; the engine must not have it yet."""
    try:
        engine.generate(chunks[0])
    except ValueError as error:
        assert "version" in str(error)
    else:
        raise AssertionError("an engine must refuse a version that it does not have")
    engine.load(5, weights)
    for chunk in chunks:
        rollouts = engine.generate(chunk)
        wanted = [(r.prompt.uid, i) for r in chunk.requests for i in r.indices]
        assert [(r.prompt.uid, r.index) for r in rollouts] == wanted, (
            "order of requests and indices"
        )
        for rollout in rollouts:
            check_rollout(rollout, chunk)
        again = engine.generate(chunk)
        for one, two in zip(rollouts, again, strict=True):
            assert one.tokens_R.tolist() == two.tokens_R.tolist(), "a chunk decides its tokens"


def check_rollout(rollout: Rollout, chunk: Chunk) -> None:
    """What every rollout of a chunk must be."""
    limit = chunk.sampling.max_new_tokens
    assert rollout.version == chunk.version
    assert 1 <= len(rollout.tokens_R) <= limit
    assert len(rollout.logprobs_R) == len(rollout.tokens_R)
    assert all(math.isfinite(p) and p <= 1e-6 for p in rollout.logprobs_R.tolist())
    assert rollout.finish in ("eos", "length")
    assert rollout.finish == "eos" or len(rollout.tokens_R) == limit


def check_reward_source(source: RewardSource, rollouts: Sequence[Rollout]) -> None:
    """One finite score per rollout, in order, the same whatever stands beside it."""
    scores = source.score(rollouts)
    assert len(scores) == len(rollouts)
    assert all(math.isfinite(score.value) and score.source for score in scores)
    assert source.score([]) == []
    backwards = source.score(list(reversed(rollouts)))
    assert list(reversed(backwards)) == scores


def check_mix_schedule(schedule: MixSchedule, twin: MixSchedule, steps: int = 12) -> None:
    """Plans are sane, and a twin that loads the state halfway plans the same from there."""
    for step in range(steps):
        plan = schedule.plan(step)
        assert set(plan.prompts) == set(ORIGINS) and all(n >= 0 for n in plan.prompts.values())
        assert plan.labelled >= 0 and plan.mu >= 0 and math.isfinite(plan.policy_coef)
        assert plan == schedule.plan(step), "planning twice must not change the plan"
        schedule.observe(step, {"reward/labelled/mean": step / steps})
        if step == steps // 2:
            twin.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        if step > steps // 2:
            assert twin.plan(step) == plan
            twin.observe(step, {"reward/labelled/mean": step / steps})


def check_tracker(tracker: Tracker) -> None:
    """Rows with and without numbers, an empty table and a growing one, a close at the end."""
    tracker.log(0, {"policy/loss": None, "semi/mu": 0.5})
    tracker.log(1, {"policy/loss": 0.25, "semi/mu": 0.5})
    tracker.table(1, [])
    tracker.table(1, [{"prompt": "a>", "response": "b", "reward": 1.0}])
    tracker.table(2, [{"prompt": "c>", "response": "d", "reward": 0.0}])
    tracker.close()


def weights() -> dict[str, torch.Tensor]:
    """Tensors of several shapes and number formats, values exact in all of them."""
    return {
        "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4) / 4,
        "b.weight": (torch.arange(6).view(2, 3) - 3).to(torch.bfloat16),
        "c.bias": torch.zeros(1),
        "d.scalar": torch.tensor(2.5),
    }


def check_transport(sender: WeightSender, receivers: Sequence[WeightReceiver]) -> None:
    """Every receiver gets every version as it was when it was sent, in any order."""
    sent = weights()
    first = sender.publish(1, sent.items())
    for tensor in sent.values():
        tensor += 1
    second = sender.publish(2, sent.items())
    assert (first.version, second.version) == (1, 2)
    for receiver in receivers:
        for version, expected in ((second, sent), (first, weights())):
            found = {name: tensor.clone() for name, tensor in receiver.fetch(version)}
            assert list(found) == list(expected)
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
