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
from dataclasses import replace
from pathlib import Path

import torch

from ppo_dist.config.base import ORIGINS
from ppo_dist.data.batching import count_tokens
from ppo_dist.protocols import (
    AdvantageEstimator,
    Gate,
    LearnerGroup,
    MixSchedule,
    NamedTensors,
    RewardSource,
    RolloutEngine,
    RolloutPool,
    Tracker,
    WeightReceiver,
    WeightSender,
)
from ppo_dist.reports import Coefficients
from ppo_dist.types import Chunk, Dropped, Rollout, Score, Scored, TrainSequence, Weights


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
        engine.sleep()
        engine.wake()
        again = engine.generate(chunk)
        for one, two in zip(rollouts, again, strict=True):
            assert one.tokens_R.tolist() == two.tokens_R.tolist(), "a chunk decides its tokens"
    most = engine.peak_memory()
    assert most is None or most > 0


def check_rollout(rollout: Rollout, chunk: Chunk) -> None:
    """What every rollout of a chunk must be."""
    limit = chunk.sampling.max_new_tokens
    assert rollout.version == chunk.version
    assert 1 <= len(rollout.tokens_R) <= limit
    assert len(rollout.logprobs_R) == len(rollout.tokens_R)
    assert all(math.isfinite(p) and p <= 1e-6 for p in rollout.logprobs_R.tolist())
    assert rollout.finish in ("eos", "length")
    assert rollout.finish == "eos" or len(rollout.tokens_R) == limit


def check_reward_source(
    source: RewardSource, rollouts: Sequence[Rollout], rounding: float = 0.0
) -> None:
    """One finite score per rollout, in order, the same (but for `rounding`, where a model computes
    it) whatever stands beside it; or a reason why there is none.
    """
    scores = source.score(rollouts)
    assert len(scores) == len(rollouts)
    assert source.score([]) == []
    backwards = source.score(list(reversed(rollouts)))
    for score, again in zip(scores, reversed(backwards), strict=True):
        if isinstance(score, Dropped):
            assert score.reason and again == score
            continue
        assert math.isfinite(score.value) and score.source
        assert isinstance(again, Score)
        assert math.isclose(score.value, again.value, rel_tol=rounding, abs_tol=rounding)
        assert replace(again, value=score.value) == score


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
    tracker.alert(2, "a title", "what to do")
    tracker.close()


def check_advantage_estimator(estimator: AdvantageEstimator) -> None:
    """Zeros under the mask, whatever stands there; rows follow from their own group alone."""
    generator = torch.Generator().manual_seed(0)
    rewards_BR, values_BR = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    mask_BR = torch.rand(6, 5, generator=generator) < 0.7
    mask_BR[0] = False
    mask_BR[1:, 2] = True
    value_end_B = torch.randn(6, generator=generator, dtype=torch.float64)
    group_B = torch.tensor([0, 0, 1, 1, 1, 2])
    inputs = (rewards_BR, values_BR, mask_BR, value_end_B, group_B)
    kept = [tensor.clone() for tensor in inputs]
    results = estimator(*inputs)
    assert all(map(torch.equal, inputs, kept)), "inputs stay as they are"
    junk = torch.where(mask_BR, 0.0, math.nan)
    order = torch.tensor([5, 3, 1, 0, 4, 2])
    shuffled = estimator(*(tensor[order] for tensor in inputs))
    with_junk = estimator(rewards_BR + junk, values_BR + junk, *inputs[2:])
    alone = estimator(*(tensor[2:5] for tensor in inputs))
    nothing = estimator(*(tensor[:0] for tensor in inputs))
    for n, result in enumerate(results):
        assert result.shape == (6, 5) and torch.isfinite(result).all()
        assert not result[~mask_BR].any()
        torch.testing.assert_close(with_junk[n], result)
        torch.testing.assert_close(shuffled[n], result[order])
        torch.testing.assert_close(alone[n], result[2:5])
        assert nothing[n].shape == (0, 5)


def check_rollout_pool(
    pool: RolloutPool, older: Weights, newer: Weights, chunks: Sequence[Chunk]
) -> None:
    """`chunks` ask for the version of `older`; there are at least two."""
    pool.load(older)
    tickets = pool.submit(chunks[:1]), pool.submit(chunks[1:])
    pool.load(newer)
    newest = pool.submit([replace(chunk, version=newer.version) for chunk in chunks])
    after = pool.collect(newest)
    later = pool.collect(tickets[1])
    before = pool.collect(tickets[0]) + later
    wanted = [(r.prompt.uid, i) for chunk in chunks for r in chunk.requests for i in r.indices]
    for weights, rollouts in ((older, before), (newer, after)):
        assert [(r.prompt.uid, r.index) for r in rollouts] == wanted, "in the order of its chunks"
        assert {r.version for r in rollouts} == {weights.version}, "each with the version it names"
    told = pool.vitals()
    assert told and sum(each.busy_s for each in told.values()) > 0
    assert all(each.busy_s == 0.0 for each in pool.vitals().values()), "seconds are told once"
    assert pool.collect(pool.submit([])) == []
    again = pool.collect(pool.submit([replace(chunk, version=newer.version) for chunk in chunks]))
    assert [r.tokens_R.tolist() for r in again] == [r.tokens_R.tolist() for r in after]


def check_learner_group(
    learners: LearnerGroup,
    responses: Sequence[Rollout],
    updates: Sequence[Sequence[TrainSequence]],
    folder: Path,
) -> None:
    """Annotates in order and changes nothing by it; one report an update; saves what it is told."""
    first, second = learners.annotate(responses), learners.annotate(responses[::-1])
    for one, two, source in zip(first, reversed(second), responses, strict=True):
        count = len(source.tokens_R)
        for name in ("logprobs_R", "reference_R", "values_R"):
            values = vars(one)[name]
            assert values.shape == (count,) and all(map(math.isfinite, values.tolist()))
            assert abs(values - vars(two)[name]).max() < 1e-4, "the same in any order"
    coefficients = Coefficients(
        policy=1.0, value=0.5, mu=0.5, kl=0.0, entropy=0.0, lr=1e-3, critic_lr=1e-3
    )
    report = learners.update(updates, coefficients)
    assert len(report.updates) == len(updates)
    for made, sequences in zip(report.updates, updates, strict=True):
        assert made.counts == count_tokens(sequences) and not made.skipped
    assert learners.update([], coefficients).updates == ()
    assert learners.publish(7).version == 7
    (folder / "checkpoint").mkdir(parents=True)
    learners.save(checkpoint=folder / "checkpoint", policy=folder / "policy")
    assert any((folder / "checkpoint").iterdir()) and (folder / "policy").is_dir()


def weights() -> dict[str, torch.Tensor]:
    """Tensors of several shapes and number formats, values exact in all of them."""
    return {
        "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4) / 4,
        "b.weight": (torch.arange(6).view(2, 3) - 3).to(torch.bfloat16),
        "c.bias": torch.zeros(1),
        "d.scalar": torch.tensor(2.5),
    }


def check_transport(sender: WeightSender, receivers: Sequence[WeightReceiver]) -> None:
    """Every receiver gets every version as it was when it was sent, and says so of no other."""
    sent = weights()
    first = sender.publish(1, sent.items())
    for receiver in receivers:
        receiver.receive(first, 10.0)
    for tensor in sent.values():
        tensor += 1
    second = sender.publish(2, sent.items())
    assert (first.version, second.version) == (1, 2) and first.digest != second.digest
    for receiver in receivers:
        receiver.receive(second, 10.0)
        for version, expected in ((first, weights()), (second, sent)):
            found = {name: tensor.clone() for name, tensor in receiver.fetch(version)}
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    again = sender.publish(3, sent.items())
    assert again.digest == second.digest, "the same weights have the same digest"


def check_gate(gate: Gate, again: Gate, steps: Sequence[Sequence[Scored]]) -> None:
    """Admits unlabelled prompts of the step alone, and decides as before after a checkpoint."""
    decisions = []
    for number, scored in enumerate(steps):
        decisions.append(gate.admit(scored))
        unlabelled = {
            s.rollout.prompt.uid for s in scored if s.rollout.prompt.origin == "unlabelled"
        }
        assert decisions[-1] <= unlabelled
        state = json.loads(json.dumps(gate.state_dict()))
        if number == len(steps) // 2:
            saved = state
    again.load_state_dict(saved)
    assert [again.admit(scored) for scored in steps[len(steps) // 2 + 1 :]] == decisions[
        len(steps) // 2 + 1 :
    ]
    assert gate.admit([]) == set()
