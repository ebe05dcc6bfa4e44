"""Majority votes, and the reward and the extractors that they rest on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ppo_dist.config.base import InputError
from ppo_dist.config.reward import Extract, FunctionOf, VoteReward
from ppo_dist.rewards.extract import extractor
from ppo_dist.rewards.rules import WeightedSum
from ppo_dist.rewards.vote import MajorityVote, vote, votes_of_the_others
from ppo_dist.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("answers", "label", "share", "margin"),
    [
        (["7", "7", "8"], "7", 2 / 3, 1 / 3),
        (["7", "8"], None, 1 / 2, 0.0),  # a tie abstains
        ([None, None, None, "7"], "7", 1 / 4, 1 / 4),  # what could not be read never wins
        ([None, None], None, 0.0, 0.0),
        (["7"] * 3, "7", 1.0, 1.0),
        ([], None, 0.0, 0.0),
    ],
)
def test_votes(answers: list[str | None], label: str | None, share: float, margin: float) -> None:
    got = vote(answers)
    assert got.label == label
    assert (got.share, got.margin) == (pytest.approx(share), pytest.approx(margin))
    assert vote(answers[::-1]).label == label


def test_the_entropy_of_a_vote() -> None:
    assert vote(["a", "b", None]).entropy == pytest.approx(math.log(2))
    assert vote(["a", "a"]).entropy == 0.0


def test_nobody_confirms_himself() -> None:
    got = [v.label for v in votes_of_the_others(["7", "7", "8", "8", None])]
    assert got == ["8", "8", "7", "7", None]


def rollouts(*groups: tuple[str, list[str]]) -> list[Rollout]:
    """Responses by prompt uid, those of different prompts in turn."""
    made = [
        Rollout(
            Prompt(uid, "unlabelled", "", np.array([3])),
            index,
            np.array([4, 1]),
            np.zeros(2, np.float32),
            text,
            "eos",
            0,
        )
        for uid, texts in groups
        for index, text in enumerate(texts)
    ]
    return sorted(made, key=lambda r: r.index)


def values(reward: MajorityVote, made: list[Rollout]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for rollout, score in zip(made, reward.score(made), strict=True):
        found.setdefault(rollout.prompt.uid, []).append(score.value)
    return found


def test_each_group_votes_for_itself() -> None:
    made = rollouts(("a", ["7", "8", "7"]), ("b", ["8", "8", "7"]), ("c", ["7", "8", "9"]))
    reward = MajorityVote(VoteReward(kind="vote"), "error")
    assert values(reward, made) == {"a": [1, 0, 1], "b": [1, 1, 0], "c": [0, 0, 0]}
    ballots = {r.prompt.uid: s.ballot for r, s in zip(made, reward.score(made), strict=True)}
    assert ballots["a"] and ballots["a"].judged and ballots["a"].vote.label == "7"
    assert ballots["c"] and not ballots["c"].judged


def test_leave_one_out_judges_each_by_the_others() -> None:
    reward = MajorityVote(VoteReward(kind="vote", leave_one_out=True), "error")
    made = rollouts(("a", ["7", "7", "7", "8"]), ("b", ["7", "7", "8"]), ("c", ["7", "8"]))
    # of b, the first 7 sees a 7 and an 8, which tie; the 8 sees two 7
    assert values(reward, made) == {"a": [1, 1, 1, 0], "b": [0, 0, 0], "c": [0, 0]}
    scores = zip(made, reward.score(made), strict=True)
    judged = {(r.prompt.uid, r.index): s.ballot and s.ballot.judged for r, s in scores}
    assert [judged["b", i] for i in range(3)] == [False, False, True]
    assert [judged["c", i] for i in range(2)] == [True, True]


def test_no_answer_never_wins_and_gets_nothing() -> None:
    reward = MajorityVote(VoteReward(kind="vote", extract=Extract(kind="last_number")), "error")
    made = rollouts(("a", ["none", "nought", "7", ""]))
    assert values(reward, made) == {"a": [0, 0, 1, 0]}


def test_a_vote_within_a_sum_is_passed_on() -> None:
    made = rollouts(("a", ["7", "7", "8"]))
    total = WeightedSum([(0.5, MajorityVote(VoteReward(kind="vote"), "error"))])
    scores = total.score(made)
    assert [s.value for s in scores] == [0.5, 0.5, 0.0]
    assert scores[0].ballot is not None and scores[0].ballot.vote.share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac12}", "1/2"),
        (r"\boxed{0.5}", "1/2"),
        (r"first \boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{}", None),
        (r"\boxed{4", None),
        ("4", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert extractor(Extract(kind="boxed"))(text) == answer


USERS = """
def last_word(text):
    words = text.split()
    return words[-1] if words else None

def broken(text):
    raise KeyError(text)
"""


def test_a_function_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(USERS)
    mine = FunctionOf(kind="function", path=str(path), name="last_word")
    assert extractor(mine)("the answer is 7") == "7"
    made = rollouts(("a", ["so 7", "thus 7", "8", ""]))
    assert values(MajorityVote(VoteReward(kind="vote", extract=mine), "error"), made) == {
        "a": [1, 1, 0, 0]
    }
    broken = VoteReward(kind="vote", extract=mine.model_copy(update={"name": "broken"}))
    with pytest.raises(InputError, match=r"reward vote: no answer could be looked for.*KeyError"):
        MajorityVote(broken, "error").score(made)
    scores = MajorityVote(broken, "zero").score(made)
    assert all(s.value == 0 and s.fault and s.ballot and not s.ballot.judged for s in scores)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("x = 1", "has no function 'f'"),
        ("f = 1", "has no function 'f'"),
        ("import nothing_of_that_name", "cannot be run: ModuleNotFoundError"),
        ("def f(:", "cannot be run: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_had(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        extractor(FunctionOf(kind="function", path=str(path), name="f"))
