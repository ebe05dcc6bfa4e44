"""What is learned from unlabelled prompts: admission, pseudo-labels, the numbers of the probe."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from ppo_dist.config.base import Origin
from ppo_dist.config.reward import ExactReward, VoteReward
from ppo_dist.config.semi import ConfidenceGate, PseudoLabels
from ppo_dist.coordinator.unlabelled import Probe, Unlabelled
from ppo_dist.protocols import Gate
from ppo_dist.rewards.rules import Judged, exact
from ppo_dist.rewards.vote import MajorityVote
from ppo_dist.semi.gate import All, Confidence
from ppo_dist.semi.pseudo import PseudoBuffer
from ppo_dist.types import Prompt, Rollout, Score, Scored


def prompt(uid: str, origin: Origin = "unlabelled", answer: str | None = None) -> Prompt:
    return Prompt(uid, origin, f"{uid}>", np.array([3, 4]), answer=answer)


def voted(uid: str, answers: Sequence[str], leave_one_out: bool = False) -> list[Scored]:
    made = [
        Rollout(prompt(uid), i, np.array([5, 1]), np.zeros(2, np.float32), text, "eos", 0)
        for i, text in enumerate(answers)
    ]
    reward = MajorityVote(VoteReward(kind="vote", leave_one_out=leave_one_out), "error")
    return [Scored(r, s) for r, s in zip(made, reward.score(made), strict=True)]


def verified(uid: str, origin: Origin, value: float) -> Scored:
    made = Rollout(prompt(uid, origin), 0, np.array([5, 1]), np.zeros(2, np.float32), "7", "eos", 0)
    return Scored(made, Score(value, "exact"))


def unlabelled(gate: Gate, probe: Probe | None = None) -> Unlabelled:
    return Unlabelled(gate, None, None, probe)


def test_ties_and_rejected_prompts_teach_nothing() -> None:
    scored = [
        *voted("sure", "7777"),
        *voted("tie", "7788"),
        *voted("unsure", "7789"),
        verified("l", "labelled", 0.0),
        verified("v", "verifiable", 1.0),
    ]
    part = unlabelled(All())
    assert {s.rollout.prompt.uid for s in part.admit(0, scored)} == {"sure", "unsure", "l", "v"}
    assert part.metrics["semi/admitted_share"] == pytest.approx(2 / 3)
    assert part.metrics["pseudo/abstain_rate"] == pytest.approx(1 / 3)
    assert part.metrics["pseudo/vote_share"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert part.metrics["pseudo/vote_margin"] == pytest.approx((1 + 0 + 0.25) / 3)
    strict = unlabelled(Confidence(ConfidenceGate(kind="confidence", share=0.75)))
    assert {s.rollout.prompt.uid for s in strict.admit(0, scored)} == {"sure", "l", "v"}
    assert strict.admit(1, []) == [] and strict.metrics == {}


def test_a_response_that_the_others_cannot_judge_teaches_nothing() -> None:
    scored = voted("a", "778", leave_one_out=True)  # each 7 sees a 7 and an 8
    assert [s.rollout.index for s in unlabelled(All()).admit(0, scored)] == [2]


def test_rewards_without_votes_need_no_ballot() -> None:
    scored = [verified("u", "unlabelled", 0.5)]
    part = unlabelled(All())
    assert part.admit(0, scored) == scored
    assert part.metrics["pseudo/vote_share"] is None


def test_pseudo_labels_have_their_own_weight() -> None:
    section = PseudoLabels.model_validate(
        {"batch": 2, "weight": {"kind": "constant", "value": 0.5, "warmup": 4}}
    )
    prompts = {uid: prompt(uid) for uid in "abc"}
    part = Unlabelled(All(), section, PseudoBuffer(section, prompts, 0), None)
    assert part.supervised(0) == []
    scored = [*voted("a", "777"), *voted("b", "778"), *voted("c", "789")]
    part.admit(1, scored)
    assert part.metrics["pseudo/accept_rate"] == pytest.approx(2 / 3)
    sequences = [*part.supervised(1), *part.supervised(1)]
    assert {s.uid for s in sequences} == {"a", "b"} and len(sequences) == 4
    assert {s.source for s in sequences} == {"pseudo_label"}
    assert all(s.ce_weight_R.tolist() == [0.25, 0.25] for s in sequences), "half way up"
    assert not any(s.policy_weight_R.any() for s in sequences)
    assert (part.metrics["pseudo/weight"], part.metrics["pseudo/tokens"]) == (0.25, 8.0)
    again = Unlabelled(All(), section, PseudoBuffer(section, prompts, 0), None)
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert [s.uid for s in again.supervised(9)] == [s.uid for s in part.supervised(9)]


def test_the_probe_by_hand() -> None:
    answers = {"right": "7", "wrong": "8", "shut out": "7", "tie": "7"}
    known = {uid: prompt(uid, "labelled", answer) for uid, answer in answers.items()}
    probe = Probe(known, Judged(exact(ExactReward(kind="exact")), "exact", "error"))
    part = unlabelled(Confidence(ConfidenceGate(kind="confidence", share=0.6)), probe)
    scored = [
        *voted("right", "7778"),  # label 7: true; each reward is right
        *voted("wrong", "7778"),  # label 7: false; each reward is wrong
        *voted("shut out", "7789"),  # label 7: true, but below the gate
        *voted("tie", "7788"),  # no label: rewards of 0, of which two are right
        *voted("not probed", "9999"),
    ]
    part.admit(0, scored)
    assert part.metrics["pseudo/label_accuracy_probe"] == 1 / 2
    assert part.metrics["pseudo/label_accuracy_probe_all"] == pytest.approx(2 / 3)
    assert part.metrics["pseudo/reward_accuracy_probe"] == pytest.approx((4 + 0 + 4 + 2) / 16)
    part.admit(1, voted("not probed", "99"))
    assert part.metrics["pseudo/label_accuracy_probe"] is None
