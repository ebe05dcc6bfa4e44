"""Which unlabelled prompts count."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from ppo_dist.config.base import Origin
from ppo_dist.config.semi import ConfidenceGate, TrajectoryGate
from ppo_dist.semi.gate import All, Confidence, Histories, Trajectory
from ppo_dist.types import Ballot, Prompt, Rollout, Score, Scored, Vote


def group(
    uid: str, rewards: Sequence[float], origin: Origin = "unlabelled", vote: Vote | None = None
) -> list[Scored]:
    prompt = Prompt(uid, origin, "", np.array([3]))
    ballot = Ballot(vote, None, True) if vote is not None else None
    return [
        Scored(
            Rollout(prompt, i, np.array([1]), np.zeros(1, np.float32), "", "eos", 0),
            Score(reward, "s", ballot=ballot),
        )
        for i, reward in enumerate(rewards)
    ]


def test_all_admits_the_unlabelled() -> None:
    scored = [*group("a", [0, 1]), *group("b", [0]), *group("c", [1], "labelled")]
    assert All().admit(scored) == {"a", "b"}
    assert All().admit([]) == set()


@pytest.mark.parametrize(
    ("share", "margin", "admitted"), [(0.5, 0.25, True), (0.49, 0.25, False), (0.5, 0.24, False)]
)
def test_confidence_has_two_bounds(share: float, margin: float, admitted: bool) -> None:
    gate = Confidence(ConfidenceGate(kind="confidence", share=0.5, margin=0.25))
    scored = group("a", [1, 0], vote=Vote("7", share, margin, 0.1))
    assert gate.admit(scored) == ({"a"} if admitted else set())
    sure = Vote("7", 1.0, 1.0, 0.0)
    assert gate.admit(group("b", [1, 1], "verifiable", sure)) == set(), "no gate's business"
    assert gate.admit(group("c", [1, 1])) == set(), "nobody voted"


# ── trajectories ──────────────────────────────────────────────────────────────────────────────────


def section(**changes: object) -> TrajectoryGate:
    return TrajectoryGate.model_validate(
        {"kind": "trajectory", "window": 1, "warmup": 2, "length": 8, **changes}
    )


def step(gate: Trajectory, labelled: float, **unlabelled: float) -> set[str]:
    """A step in which prompts have these pass rates, in tenths."""
    scored = group(
        "known", [1.0] * round(10 * labelled) + [0.0] * round(10 * (1 - labelled)), "labelled"
    )
    for uid, rate in unlabelled.items():
        scored += group(uid, [1.0] * round(10 * rate) + [0.0] * round(10 * (1 - rate)))
    return gate.admit(scored)


def test_similarity_by_hand() -> None:
    gate = Trajectory(section(top=0.0, threshold=0.5))
    assert step(gate, 0.1, up=0.3, down=0.9, flat=0.5, zigzag=0.2) == set()
    assert step(gate, 0.2, up=0.4, down=0.8, flat=0.5, zigzag=0.6) == set()  # warm-up
    assert step(gate, 0.3, up=0.5, down=0.7, flat=0.5, zigzag=0.2) == {"up", "zigzag"}
    # z-normalised: up is (−1, 0, 1)/√2 as the labelled one; zigzag is (−1, 2, −1)/√6, so 0
    cosines = gate.similarities(["up", "down", "flat", "zigzag", "never seen"])
    assert cosines == pytest.approx([1.0, -1.0, 0.0, 0.0, 0.0], abs=2e-3)
    assert step(gate, 0.4, up=0.6, down=0.6, flat=0.5, zigzag=0.6) == {"up"}


def test_the_top_share_is_admitted_below_the_threshold_too() -> None:
    gate = Trajectory(section(top=0.5, threshold=1.0, warmup=3))
    for rates in ((0.1, 0.1, 0.4, 0.5), (0.2, 0.9, 0.3, 0.5), (0.3, 0.4, 0.2, 0.5)):
        a, b, c, d = rates
        assert step(gate, a, b=b, c=c, d=d) == set()
    # b rose in all, c fell, d never moved: of three the top half is two, but never one below 0
    assert step(gate, 0.4, b=0.5, c=0.1, d=0.5) == {"b"}


def test_a_missed_window_keeps_the_rate_before_it() -> None:
    histories = Histories(4)
    histories.add({"a": 0.0, "b": 0.0})
    histories.add({"a": 0.0})
    histories.add({"a": 1.0, "b": 1.0, "c": 0.5})
    a, b, c = histories.standardised(["a", "b", "c"])
    assert a.tolist() == b.tolist() == pytest.approx([-0.4082, -0.4082, 0.8165], abs=1e-4)
    assert not c.any()  # its first known rate stands for those before it


def test_only_the_newest_windows_count() -> None:
    histories = Histories(2)
    for rate in (1.0, 0.0, 0.5):
        histories.add({"a": rate})
    assert histories.standardised(["a"])[0].tolist() == pytest.approx([-0.7071, 0.7071], abs=1e-3)


def stream(gate: Trajectory, steps: range) -> tuple[list[set[str]], list[set[str]]]:
    """Prompts whose majority is right get better as the labelled ones do, at their own pace and
    level; those whose majority is wrong wander, or sharpen at once and stay. A third of them comes
    in each step.
    """
    admitted, came = [], []
    for t in steps:
        rng = np.random.default_rng(t)
        scored: list[Scored] = []
        here = [i for i in range(120) if i % 3 == t % 3]
        progress = 1 / (1 + np.exp(-(t - 18) / 5))
        for i in range(20):
            scored += group(f"labelled{i}", rng.random(8) < 0.1 + 0.8 * progress, "labelled")
        for i in here:
            own = np.random.default_rng(1000 + i)
            reliable, level = own.random() < 0.5, own.uniform(0.5, 0.9)
            start = own.uniform(0.05, 0.3)
            if reliable:
                rate = start + (level - start) * progress
            elif own.random() < 0.5:
                rate = level - (level - start) * progress  # its majority loses ground
            else:
                rate = 0.5 + 0.05 * np.sin(t + i)
            scored += group(f"{'good' if reliable else 'bad'}{i}", rng.random(8) < rate)
        admitted.append(gate.admit(scored))
        came.append(
            {s.rollout.prompt.uid for s in scored if s.rollout.prompt.origin == "unlabelled"}
        )
    return admitted, came


def test_reliable_prompts_are_told_from_others() -> None:
    gate = Trajectory(section(window=3, warmup=6, length=16, threshold=0.4, top=0.0))
    admitted, came = stream(gate, range(48))
    assert not any(admitted[:18])
    chosen = [uid for uids in admitted[30:] for uid in uids]
    good = [uid for uids in came[30:] for uid in uids if uid.startswith("good")]
    right = sum(uid.startswith("good") for uid in chosen)
    assert right / len(chosen) >= 0.9, "precision"
    assert right / len(good) >= 0.9, "recall"


def test_decisions_go_on_from_a_checkpoint() -> None:
    whole = Trajectory(section(window=3, warmup=3))
    expected, _ = stream(whole, range(24))
    for stop in (4, 11, 18):  # within a window of the warm-up, in a window, at its end
        first, second = (
            Trajectory(section(window=3, warmup=3)),
            Trajectory(section(window=3, warmup=3)),
        )
        before, _ = stream(first, range(stop))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after, _ = stream(second, range(stop, 24))
        assert before + after == expected
        assert any(after)


@pytest.mark.slow
def test_a_million_histories_take_less_than_a_gigabyte() -> None:
    tracemalloc.start()
    histories = Histories(16)
    uids = [f"unlabelled/0:{i}" for i in range(1_000_000)]
    for rate in (0.25, 0.5):
        histories.add(dict.fromkeys(uids, rate))
    saved = json.dumps(histories.state_dict())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e9
    again = Histories(16)
    again.load_state_dict(json.loads(saved))
    assert again.standardised(uids[-1:]).tolist() == histories.standardised(uids[-1:]).tolist()


def test_a_pass_is_agreement_with_the_vote_whatever_else_is_rewarded() -> None:
    gate = Trajectory(TrajectoryGate(kind="trajectory", window=2))
    vote = Vote("7", 0.5, 0.25, 0.6)
    answers = {"7": 1.1, "8": 0.1, "9": 0.1}  # a tenth for a good form
    voted = [
        replace(s, score=replace(s.score, value=value, ballot=Ballot(vote, answer, True)))
        for s, (answer, value) in zip(group("a", [0, 0, 0]), answers.items(), strict=True)
    ]
    gate.admit([*voted, *group("b", [1.0, 0.9, 0.0, 0.0], "labelled")])
    assert gate.state_dict()["open"] == {"a": (pytest.approx(1 / 3), 1), "b": (0.25, 1)}
