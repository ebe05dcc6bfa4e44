"""The order of the data, and what an update is made of."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_dist.algo.advantages import Gae
from ppo_dist.build import advantage_estimator
from ppo_dist.config.algorithm import Algorithm
from ppo_dist.coordinator import experience
from ppo_dist.coordinator.experience import Experience, supervised, updates
from ppo_dist.coordinator.stream import Cursor, Stream
from ppo_dist.types import (
    Annotation,
    LabelledExample,
    MixPlan,
    Prompt,
    Rollout,
    Score,
    Scored,
    TrainSequence,
)

takes = st.lists(st.integers(0, 9), max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), takes)
def test_every_epoch_has_every_item_once(size: int, counts: list[int]) -> None:
    cursor = Cursor(list(range(size)), seed=1, salt=0)
    taken = [item for count in counts for item in cursor.take(count)]
    assert len(taken) == sum(counts)
    for begin in range(0, len(taken) - size + 1, size):
        assert sorted(taken[begin : begin + size]) == list(range(size))
    rest = taken[len(taken) - len(taken) % size :]
    assert len(set(rest)) == len(rest)


def test_epochs_seeds_and_salts_have_orders_of_their_own() -> None:
    def order(seed: int, salt: int) -> list[int]:
        return Cursor(list(range(20)), seed, salt).take(40)

    first = order(1, 0)
    assert first == order(1, 0)
    assert first[:20] != first[20:]
    assert first[:20] != list(range(20))
    assert first != order(2, 0)
    assert first != order(1, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), takes, takes)
def test_a_cursor_goes_on_where_it_was(size: int, before: list[int], later: list[int]) -> None:
    items = [f"item {i}" for i in range(size)]
    cursor = Cursor(items, seed=5, salt=2)
    for count in before:
        cursor.take(count)
    resumed = Cursor(items, seed=5, salt=2)
    resumed.take(3)  # whatever it did before is forgotten
    resumed.load_state_dict(cursor.state_dict())
    assert [resumed.take(c) for c in later] == [cursor.take(c) for c in later]
    assert resumed.state_dict() == cursor.state_dict()
    assert cursor.state_dict() == {"taken": sum(before) + sum(later), "items": size}


def test_a_cursor_refuses_other_data() -> None:
    state = Cursor([1, 2, 3], 0, 0).state_dict()
    with pytest.raises(ValueError, match="the data had 3 rows, now it has 4"):
        Cursor([1, 2, 3, 4], 0, 0).load_state_dict(state)


def prompt(uid: str, origin: str = "verifiable", tokens: tuple[int, ...] = (5,)) -> Prompt:
    return Prompt(uid, origin, uid, np.array(tokens, np.int64))  # type: ignore[arg-type]


def example(i: int) -> LabelledExample:
    return LabelledExample(prompt(f"e{i}", "labelled"), "r", np.array([i, 1], np.int64))


def stream() -> Stream:
    prompts = {
        "verifiable": [prompt(f"v{i}") for i in range(5)],
        "unlabelled": [prompt(f"u{i}", "unlabelled") for i in range(3)],
    }
    return Stream(prompts, [example(i) for i in range(4)], seed=3)  # type: ignore[arg-type]


PLAN = MixPlan({"labelled": 0, "verifiable": 4, "unlabelled": 2}, labelled=3, mu=0.1, policy_coef=1)
SUPERVISED = MixPlan({"labelled": 0, "verifiable": 0, "unlabelled": 0}, 3, 1.0, 0.0)


def test_a_stream_follows_the_plan() -> None:
    s = stream()
    asked = s.prompts(PLAN)
    assert Counter(p.origin for p in asked) == {"verifiable": 4, "unlabelled": 2}
    assert len({p.uid for p in asked}) == 6
    first, second = s.examples(PLAN), s.examples(PLAN)
    assert len({e.prompt.uid for e in first}) == len(second) == 3
    assert {e.prompt.uid for e in [*first, second[0]]} == {"e0", "e1", "e2", "e3"}
    assert s.prompts(SUPERVISED) == []
    assert s.state_dict() == {
        "verifiable": {"taken": 4, "items": 5},
        "unlabelled": {"taken": 2, "items": 3},
        "examples": {"taken": 6, "items": 4},
    }


def test_a_stream_goes_on_where_it_was() -> None:
    one, other = stream(), stream()
    for _ in range(2):
        one.prompts(PLAN), one.examples(PLAN)
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        assert [p.uid for p in other.prompts(PLAN)] == [p.uid for p in one.prompts(PLAN)]
        assert [e.response for e in other.examples(PLAN)] == [
            e.response for e in one.examples(PLAN)
        ]


def test_supervised_steps_do_not_move_the_prompts() -> None:
    one, other = stream(), stream()
    one.prompts(SUPERVISED), one.examples(SUPERVISED)
    assert [p.uid for p in one.prompts(PLAN)] == [p.uid for p in other.prompts(PLAN)]


def test_a_labelled_example_is_imitated_on_its_response_alone() -> None:
    made = supervised(LabelledExample(prompt("e", "labelled", (5, 6)), "r", np.array([7, 8, 1])))
    assert made.tokens_T.tolist() == [5, 6, 7, 8, 1]
    assert made.prompt_tokens == 2
    assert made.ce_weight_R.tolist() == [1, 1, 1]
    assert made.policy_weight_R.tolist() == made.value_weight_R.tolist() == [0, 0, 0]


def test_a_text_without_a_prompt_is_learned_whole() -> None:
    """PPO-ptx: the first token stands as the prompt, all others are learned."""
    made = supervised(LabelledExample(prompt("e", "labelled", (5,)), "r", np.array([6, 7, 8, 1])))
    assert made.ce_weight_R.tolist() == [1, 1, 1, 1] and made.prompt_tokens == 1


def scored(uid: str, index: int, reward: float, finish: str = "eos", length: int = 2) -> Scored:
    tokens_R = np.full(length, 9, np.int64)
    numbers = np.zeros(length, np.float32)
    made = Rollout(prompt(uid, tokens=(int(uid),)), index, tokens_R, numbers, "t", finish, 0)  # type: ignore[arg-type]
    return Scored(made, Score(reward, "s"))


def annotated(logprobs: list[float], reference: list[float], values: list[float]) -> Annotation:
    rows = (np.array(row, np.float32) for row in (logprobs, reference, values))
    return Annotation(*rows, value_end=4.0)


@pytest.mark.parametrize(("bootstrap", "end"), [(False, 0.0), (True, 4.0)])
def test_experience(bootstrap: bool, end: float) -> None:
    """λ = γ = 1: an advantage is what is to come less the value; only truncated ends bootstrap."""
    algorithm = Algorithm.model_validate(
        {
            "advantage": {"kind": "gae", "lam": 1.0, "whiten": "off"},
            "kl": 0.5,
            "truncated": "bootstrap" if bootstrap else "end",
        }
    )
    judged = [scored("5", 0, 1.0), scored("6", 3, 2.0, finish="length", length=1)]
    said = [annotated([-1, -2], [-2, -2], [0.25, 0.5]), annotated([-1], [-1], [0.75])]
    first, second = Experience(algorithm, Gae(1.0, 1.0))(judged, said, teaches_policy=True)
    assert (first.uid, second.uid) == ("5#0", "6#3")
    assert first.tokens_T.tolist() == [5, 9, 9]
    assert first.returns_R.tolist() == [0.5, 1.0]  # 1 − β·1 on the first token
    assert first.advantages_R.tolist() == [0.25, 0.5]
    assert second.returns_R.tolist() == [2.0 + end]
    assert second.advantages_R.tolist() == [1.25 + end]
    assert first.policy_weight_R.tolist() == first.value_weight_R.tolist() == [1, 1]
    assert first.ce_weight_R.tolist() == [0, 0]
    assert Experience(algorithm, Gae())([], [], teaches_policy=True) == []


def reinforced(groups: int, size: int) -> list[TrainSequence]:
    judged = [scored(str(g), i, 0.0) for i in range(size) for g in range(groups)]
    said = [annotated([0, 0], [0, 0], [0, 0])] * len(judged)
    return Experience(Algorithm(), Gae())(judged, said, teaches_policy=True)


def names(made: list[list[TrainSequence]]) -> list[list[str]]:
    return [[s.uid for s in update] for update in made]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_updates(groups: int, size: int, epochs: int, minibatches: int) -> None:
    sequences = reinforced(groups, size)
    algorithm = Algorithm(epochs=epochs, minibatches=minibatches)
    labelled = [supervised(example(0)), supervised(example(1))]
    made = names(updates(sequences, lambda: labelled, algorithm, 0, 0))
    assert len(made) == epochs * minibatches
    assert all(update[-2:] == ["e0", "e1"] for update in made)
    parts = [update[:-2] for update in made]
    for epoch in range(epochs):
        of_epoch = parts[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(uid for part in of_epoch for uid in part) == sorted(s.uid for s in sequences)
    for part in parts:
        counts = Counter(uid.split("#")[0] for uid in part)
        assert set(counts.values()) <= {size}  # whole groups


def test_updates_follow_from_seed_and_step() -> None:
    sequences = reinforced(8, 2)
    algorithm = Algorithm(epochs=2, minibatches=2)

    def made(seed: int, step: int) -> list[list[str]]:
        return names(updates(sequences, list, algorithm, seed, step))

    assert made(1, 4) == made(1, 4)
    assert made(1, 4) != made(1, 5)
    assert made(1, 4) != made(2, 4)
    assert made(1, 4)[:2] != made(1, 4)[2:]  # newly shuffled each epoch


def test_each_update_takes_examples_of_its_own() -> None:
    s = stream()
    take = lambda: list(map(supervised, s.examples(SUPERVISED)))  # noqa: E731
    made = updates([], take, Algorithm(epochs=2, minibatches=2), 0, 0)
    assert [len(update) for update in made] == [3, 3, 3, 3]
    assert Counter(uid for update in names(made) for uid in update) == {
        f"e{i}": 3 for i in range(4)
    }


# ── the choices of `algorithm` ────────────────────────────────────────────────────────────────────


def shaped(
    choices: dict[str, Any], judged: list[Scored], said: list[Annotation]
) -> list[TrainSequence]:
    algorithm = Algorithm.model_validate(choices)
    return Experience(algorithm, advantage_estimator(algorithm.advantage))(judged, said, True)


OFF = {"advantage": {"kind": "gae", "lam": 1.0, "whiten": "off"}, "kl": 0.0}
QUIET = annotated([-1, -1], [-1, -1], [0, 0])


def test_whitening_spans_the_step_and_returns_stay_as_they_are() -> None:
    judged = [scored("5", 0, 1.0), scored("6", 3, 2.0, length=1), scored("6", 4, -1.0)]
    said = [QUIET, annotated([-1], [-1], [0.75]), QUIET]
    made = shaped({"kl": 0.0}, judged, said)
    flat = np.concatenate([s.advantages_R for s in made])
    assert flat.mean() == pytest.approx(0, abs=1e-6)
    assert flat.var(ddof=1) == pytest.approx(1, rel=1e-5)
    assert made[1].returns_R.tolist() == [2.0]


@pytest.mark.parametrize("kind", ["gae", "group_mean", "rloo", "reinforce_pp"])
def test_the_size_of_a_table_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0)
    judged, said = [], []
    for i in range(24):
        length = int(drawn.integers(1, 6))
        judged.append(scored(str(i % 5), i // 5, float(drawn.normal()), length=length))
        said.append(annotated(*drawn.normal(size=(3, length)).tolist()))
    choices = {"advantage": {"kind": kind}, "kl": {"coef": 0.1}}
    whole = shaped(choices, judged, said)
    monkeypatch.setattr(experience, "TABLE", 9)
    for one, other in zip(whole, shaped(choices, judged, said), strict=True):
        assert one.uid == other.uid and one.advantages_R.any()
        np.testing.assert_array_equal(one.advantages_R, other.advantages_R)
        np.testing.assert_array_equal(one.returns_R, other.returns_R)


def test_whitening_by_origin() -> None:
    judged = [scored(u, i, r) for u, i, r in (("5", 0, 1.0), ("5", 1, 3.0), ("6", 0, 10.0))]
    judged += [scored("6", 1, 50.0)]
    judged = [
        replace(
            s,
            rollout=replace(
                s.rollout,
                prompt=replace(
                    s.rollout.prompt,
                    origin="labelled" if s.rollout.prompt.uid == "5" else "verifiable",
                ),
            ),
        )
        for s in judged
    ]
    made = shaped(
        {"advantage": {"kind": "gae", "whiten": "per_origin", "lam": 1.0}, "kl": 0.0},
        judged,
        [QUIET] * 4,
    )
    for part in (made[:2], made[2:]):
        flat = np.concatenate([s.advantages_R for s in part])
        assert flat.mean() == pytest.approx(0, abs=1e-6)
        assert flat.var(ddof=1) == pytest.approx(1, rel=1e-5)


def test_truncated_responses_may_teach_nothing() -> None:
    judged = [scored("5", 0, 1.0), scored("5", 1, 9.0, finish="length"), scored("6", 0, 3.0)]
    plain = {"advantage": {"kind": "gae", "lam": 1.0}, "kl": 0.0}
    first, cut, second = shaped({**plain, "truncated": "mask"}, judged, [QUIET] * 3)
    assert not cut.policy_weight_R.any() and not cut.value_weight_R.any()
    # nor do they shift the others: 1 and 3 alone are whitened
    root = np.sqrt(3) / 2
    assert [*first.advantages_R, *second.advantages_R] == pytest.approx([-root] * 2 + [root] * 2)


def test_truncated_responses_may_be_penalised() -> None:
    judged = [scored("5", 0, 1.0), scored("5", 1, 1.0, finish="length")]
    choices = {**OFF, "truncated": {"kind": "penalise", "by": 0.75}}
    first, cut = shaped(choices, judged, [QUIET] * 2)
    assert first.returns_R.tolist() == [1.0, 1.0] and cut.returns_R.tolist() == [0.25, 0.25]


def test_scores_may_be_clipped_and_scaled() -> None:
    judged = [scored("5", 0, 1.0), scored("5", 1, 7.0)]
    clipped = shaped({**OFF, "reward": {"clip": 2.0}}, judged, [QUIET] * 2)
    assert [s.returns_R[0] for s in clipped] == [1.0, 2.0]
    scaled = shaped({**OFF, "reward": {"normalise": True}}, judged, [QUIET] * 2)
    deviation = np.std([1.0, 7.0], ddof=1)
    assert [s.returns_R[0] for s in scaled] == pytest.approx([1 / deviation, 7 / deviation])


@pytest.mark.parametrize(("name", "expected"), [("k1", -1.0), ("k2", 0.5), ("k3", np.e - 2)])
def test_the_estimator_in_the_reward(name: str, expected: float) -> None:
    said = [annotated([-3, -1], [-2, -1], [0, 0])]
    kl = {"kind": "reward", "coef": 0.5, "estimator": name}
    (made,) = shaped({**OFF, "kl": kl}, [scored("5", 0, 1.0)], said)
    assert made.returns_R.tolist() == pytest.approx([1 - 0.5 * expected, 1.0])


def test_kl_in_the_loss_leaves_the_reward_alone() -> None:
    said = [annotated([-3, -1], [-2, -1.5], [0, 0])]
    (made,) = shaped({**OFF, "kl": {"kind": "loss", "coef": 9.0}}, [scored("5", 0, 1.0)], said)
    assert made.returns_R.tolist() == [1.0, 1.0]
    assert made.reference_R.tolist() == [-2.0, -1.5]


def test_the_adaptive_coefficient_holds_for_its_step_and_is_remembered() -> None:
    kl = {"coef": 0.5, "controller": {"kind": "adaptive", "target": 1.0, "horizon": 10}}
    algorithm = Algorithm.model_validate({**OFF, "kl": kl})
    one, other = Experience(algorithm, Gae(1.0, 1.0)), Experience(algorithm, Gae(1.0, 1.0))
    said = [annotated([-1, -1], [-3, -3], [0, 0])]  # a KL of 4: four times the target
    (made,) = one([scored("5", 0, 1.0)], said, True)
    assert made.returns_R.tolist() == [1 - 0.5 * 4, 1 - 0.5 * 2]
    assert one.kl_coef == pytest.approx(0.5 * (1 + 0.2 * 1 / 10))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.kl_coef == one.kl_coef


def test_without_a_critic_nothing_is_learned_by_one() -> None:
    made = shaped({"advantage": "rloo"}, [scored("5", 0, 1.0), scored("5", 1, 3.0)], [QUIET] * 2)
    assert [s.advantages_R.tolist() for s in made] == [[-2.0, -2.0], [2.0, 2.0]]
    assert not any(s.value_weight_R.any() for s in made)


def test_while_the_critic_warms_up_the_policy_learns_nothing() -> None:
    judged, algorithm = [scored("5", 0, 1.0)], Algorithm()
    (made,) = Experience(algorithm, Gae())(judged, [QUIET], teaches_policy=False)
    assert not made.policy_weight_R.any() and made.value_weight_R.all()


def test_sequences_may_weigh_the_same() -> None:
    judged = [scored("5", i, 1.0, length=n) for i, n in enumerate((1, 2, 6))]
    judged += [scored("5", 3, 1.0, finish="length", length=9)]
    said = [annotated([0] * n, [0] * n, [0] * n) for n in (len(s.rollout.tokens_R) for s in judged)]
    choices = {"aggregate": "sequence", "truncated": "mask"}
    sequences = shaped(choices, judged, said)
    (update,) = updates(sequences, list, Algorithm.model_validate(choices), 0, 0)
    live = [s for s in update if s.policy_weight_R.any()]
    tokens = sum(len(s.policy_weight_R) for s in live)
    assert [float(s.policy_weight_R.sum()) / tokens for s in live] == pytest.approx([1 / 3] * 3)
    assert all(s.value_weight_R.tolist() == [1] * len(s.value_weight_R) for s in live)
