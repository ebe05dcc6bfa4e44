"""The buffer of pseudo-labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ppo_dist.config.base import Origin
from ppo_dist.config.semi import PseudoLabels
from ppo_dist.semi.pseudo import PseudoBuffer
from ppo_dist.types import FinishReason, Prompt, Rollout, Score, Scored

PROMPTS = {f"u{i}": Prompt(f"u{i}", "unlabelled", "", np.array([3, i])) for i in range(9)}


def buffer(**keys: Any) -> PseudoBuffer:
    return PseudoBuffer(PseudoLabels.model_validate({"batch": 4, **keys}), PROMPTS, seed=0)


def response(
    uid: str,
    token: int,
    reward: float = 1.0,
    logprob: float = -1.0,
    finish: FinishReason = "eos",
    origin: Origin = "unlabelled",
) -> Scored:
    prompt = Prompt(uid, origin, "", PROMPTS[uid].tokens_P)
    tokens = np.array([token, 1])
    logprobs = np.full(2, logprob, np.float32)
    return Scored(
        Rollout(prompt, 0, tokens, logprobs, str(token), finish, 0), Score(reward, "vote")
    )


def held(b: PseudoBuffer) -> list[tuple[str, int]]:
    return [(uid, tokens[0]) for uid, _, tokens, _ in b.state_dict()["entries"]]


def test_the_likeliest_of_the_best_is_taken() -> None:
    b = buffer()
    scored = [
        response("u1", 5, logprob=-0.9),
        response("u1", 6, logprob=-0.2),
        response("u1", 7, reward=0.0, logprob=-0.1),
        response("u1", 8, logprob=-0.1, finish="length"),  # cut off: has no end to imitate
        response("u2", 5, reward=0.9),  # below min_reward
        response("u3", 5, origin="verifiable"),
    ]
    assert b.count(scored) == 2
    assert b.add(0, scored) == 1
    assert held(b) == [("u1", 6)]


def test_what_else_came_with_a_response_is_let_go() -> None:
    """Of a worker's answer every array is a view, which keeps all of it in Ray's object store."""
    b = buffer()
    all_of_it = np.array([9, 9, 6, 1])
    given = response("u1", 6)
    rollout = replace(given.rollout, tokens_R=all_of_it[2:])
    b.add(0, [Scored(rollout, given.score)])
    (entry,) = b._entries.values()
    assert entry.tokens_R.tolist() == [6, 1] and entry.tokens_R.base is None


def test_verified_responses_can_be_taken_too() -> None:
    b = buffer(origins=["unlabelled", "verifiable"], min_reward=0.5)
    scored = [response("u2", 5, reward=0.9), response("u3", 5, origin="verifiable")]
    assert b.add(0, scored) == 2
    assert held(b) == [("u2", 5), ("u3", 5)]


def test_the_same_again_is_kept_once_and_as_new() -> None:
    b = buffer(capacity=2)
    b.add(0, [response("u1", 5)])
    b.add(1, [response("u2", 5)])
    b.add(2, [response("u1", 5)])
    assert held(b) == [("u2", 5), ("u1", 5)]
    b.add(3, [response("u3", 5)])  # the oldest goes
    assert held(b) == [("u1", 5), ("u3", 5)]


def test_a_prompt_keeps_its_newest() -> None:
    b = buffer(per_prompt=2)
    for step, token in enumerate((5, 6, 5, 7)):
        b.add(step, [response("u1", token)])
    assert held(b) == [("u1", 5), ("u1", 7)]
    one = buffer()
    for step, token in enumerate((5, 6)):
        one.add(step, [response("u1", token), response("u2", 9)])
    assert held(one) == [("u1", 6), ("u2", 9)]


def test_old_ones_go() -> None:
    b = buffer(max_age=3)
    b.add(0, [response("u1", 5)])
    b.add(1, [response("u2", 5)])
    assert (len(b), b.mean_age(1)) == (2, 0.5)
    b.add(3, [])
    assert held(b) == [("u2", 5)]
    b.add(4, [])
    assert len(b) == 0 and b.mean_age(4) is None and b.take() == []


def fill(b: PseudoBuffer, steps: Sequence[int]) -> list[list[str]]:
    taken = []
    for step in steps:
        b.add(step, [response(f"u{(step * 3 + i) % 9}", step % 4 + 5) for i in range(3)])
        taken += [[f"{e.prompt.uid}:{e.response}" for e in b.take()] for _ in range(2)]
    return taken


def test_batches_are_without_repetition_and_go_on_from_a_checkpoint() -> None:
    keys = {"capacity": 7, "max_age": 4, "per_prompt": 2}
    expected = fill(buffer(**keys), range(10))
    assert all(len(set(batch)) == len(batch) <= 4 for batch in expected)
    assert len({tuple(batch) for batch in expected}) > 5
    first, second = buffer(**keys), buffer(**keys)
    before = fill(first, range(5))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + fill(second, range(5, 10)) == expected
    assert held(first) != [] and second.state_dict()["drawn"] == 20


def test_what_is_gone_leaves_nothing_behind() -> None:
    """Neither by age nor by number may memory grow; also where nothing new comes."""
    b = buffer(capacity=2, max_age=3)
    for step, uid in enumerate(["u1", "u2", "u4"]):
        b.add(step, [response(uid, 5)])
    assert len(b) == 2 and set(b._of_prompt) == {uid for uid, _ in held(b)}
    b.expire(99)
    assert len(b) == 0 and b._of_prompt == {}
