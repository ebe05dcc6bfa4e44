"""Judges of responses."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest

from ppo_dist.config.base import InputError
from ppo_dist.config.data import GymSource
from ppo_dist.config.reward import (
    ExactReward,
    Extract,
    ExtractAfter,
    GymReward,
    NumericReward,
    RegexReward,
)
from ppo_dist.data.sources import read
from ppo_dist.rewards.extract import (
    after,
    extractor,
    first_line,
    is_same_mathematics,
    last_number,
    whole_text,
)
from ppo_dist.rewards.gym import gym
from ppo_dist.rewards.rules import ByOrigin, Judged, WeightedSum, exact, numeric, regex
from ppo_dist.rewards.user import load_function
from ppo_dist.types import Checker, Dropped, Prompt, Rollout, Score


def rollout(
    text: str,
    answer: str | None = None,
    origin: str = "verifiable",
    checker: Checker | None = None,
    uid: str = "v/0:7",
) -> Rollout:
    prompt = Prompt(uid, origin, "q", np.ones(1, np.int64), answer, checker)  # type: ignore[arg-type]
    none = np.zeros(0, np.float32)
    return Rollout(prompt, 0, none.astype(np.int64), none, text, "eos", 0)


@pytest.mark.parametrize(
    ("text", "whole", "line", "number", "marked"),
    [
        ("  42 \n", "42", "42", "42", None),
        ("", None, None, None, None),
        (" \n\t", None, None, None, None),
        ("\n so:\nA: 1,234.5 m\n", "so:\nA: 1,234.5 m", "so:", "1234.5", "1,234.5 m"),
        ("A: 1 then A: -2.", "A: 1 then A: -2.", "A: 1 then A: -2.", "-2", "-2."),
        ("5 apples, 7", "5 apples, 7", "5 apples, 7", "7", None),
        ("A:", "A:", "A:", None, None),
        ("it is -.5", "it is -.5", "it is -.5", "-.5", None),
        ("3.2e8 or 1e-05", "3.2e8 or 1e-05", "3.2e8 or 1e-05", "1e-05", None),
    ],
)
def test_extractors(
    text: str, whole: str | None, line: str | None, number: str | None, marked: str | None
) -> None:
    assert whole_text(text) == whole
    assert first_line(text) == line
    assert last_number(text) == number
    assert after(text, "A:") == marked


@pytest.mark.parametrize(
    ("extract", "found"),
    [
        (Extract(), "x 1\nA:3\n9"),
        (Extract(kind="first_line"), "x 1"),
        (Extract(kind="last_number"), "9"),
        (ExtractAfter(kind="after", marker="A:"), "3"),
    ],
)
def test_the_extractor_that_a_config_names(extract: Extract, found: str) -> None:
    assert extractor(extract)(" x 1\nA:3\n9\n") == found


@pytest.mark.parametrize(
    ("text", "answer", "score", "score_ignoring_case"),
    [
        ("Olleh", "Olleh", 1, 1),
        (" Olleh\n", "\tOlleh ", 1, 1),
        ("olleh", "Olleh", 0, 1),
        ("Olle", "Olleh", 0, 0),
        ("Olleh!", "Olleh", 0, 0),
        ("", "Olleh", 0, 0),
        ("", "", 0, 0),  # nothing found is never right
    ],
)
def test_exact(text: str, answer: str, score: float, score_ignoring_case: float) -> None:
    assert exact(ExactReward(kind="exact"))(rollout(text, answer)) == score
    loose = exact(ExactReward(kind="exact", ignore_case=True))
    assert loose(rollout(text, answer)) == score_ignoring_case


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so it is 42.", "42", 1),
        ("1,234", "1234.0", 1),
        ("1234", "1,234", 1),
        ("-3", "-3", 1),
        ("3", "-3", 0),
        ("42 or 43", "42", 0),
        ("3.0000001", "3", 1),
        ("3.001", "3", 0),
        ("none", "3", 0),
        ("", "0", 0),
    ],
)
def test_numeric(text: str, answer: str, score: float) -> None:
    assert numeric(NumericReward(kind="numeric"))(rollout(text, answer)) == score


def test_an_answer_in_a_text_is_read_as_that_of_a_response() -> None:
    """That of a labelled example is its whole response where it has no other."""
    gold = "9 and 3 are 12, so it is 1,012."
    judge = numeric(NumericReward(kind="numeric"))
    assert [judge(rollout(text, gold)) for text in ("1012", "so 1,012", "12")] == [1, 1, 0]
    with pytest.raises(ValueError, match="the answer 'none' has no number"):
        judge(rollout("1", "none"))
    line = exact(ExactReward(kind="exact", extract="first_line"))
    loose = exact(ExactReward(kind="exact", extract="first_line", ignore_case=True))
    assert loose(rollout("YES\nI think", "yes\nsince …")) == 1
    assert line(rollout("", " \n")) == 0, "nothing is no answer"
    assert [line(rollout(text, "yes\nsince …")) for text in ("yes\nI think", "no")] == [1, 0]


def test_numeric_tolerance_and_extract() -> None:
    near = numeric(NumericReward(kind="numeric", tolerance=0.5))
    assert [near(rollout(text, "3")) for text in ("3.5", "2.5", "3.6")] == [1, 1, 0]
    whole = numeric(NumericReward(kind="numeric", extract="text"))
    assert [whole(rollout(text, "30")) for text in ("3e1", "is 30", "nan", "inf")] == [1, 0, 0, 0]


def test_regex() -> None:
    judge = regex(RegexReward(kind="regex", pattern=r"^\d+$"))
    assert [judge(rollout(text)) for text in ("123", "a1", "")] == [1, 0, 0]
    with pytest.raises(InputError, match=r"reward: '\(' is not a regular expression"):
        regex(RegexReward(kind="regex", pattern="("))


@pytest.fixture(scope="module", params=["spell_backward", "chain_sum"])
def asked(request: pytest.FixtureRequest) -> Prompt:
    source = GymSource(kind="reasoning_gym", task=request.param, size=1, split="train")
    (row,) = read([source], "verifiable", "verifiable", needs_answer=True)
    return Prompt(row.uid, "verifiable", "q", np.ones(1, np.int64), row.answer, row.checker)


def test_gym(asked: Prompt) -> None:
    judge = gym(GymReward(kind="reasoning_gym"))
    texts = [
        f" {asked.answer}\n",
        f"x{asked.answer}",
        "garbage",
        "",
        f"x\n{asked.answer}",
    ]
    scores = [judge(rollout(text, asked.answer, checker=asked.checker)) for text in texts]
    assert scores == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("length", range(3, 16))
def test_gym_strict_refuses_an_answer_that_goes_on(length: int) -> None:
    """spell_backward adds 1/n per right letter, which is above 1 for some n: no full score."""
    word = "abcdefghijklmno"[:length]
    entry = {"question": "q", "answer": word, "metadata": {"word": word[::-1]}}
    judge = gym(GymReward(kind="reasoning_gym"))
    checker = Checker("spell_backward", {}, entry)
    assert judge(rollout(word, checker=checker)) == 1
    assert judge(rollout(f"{word}x", checker=checker)) == 0


def test_gym_extracts_first(asked: Prompt) -> None:
    judge = gym(GymReward(kind="reasoning_gym", extract={"kind": "after", "marker": "A:"}))
    text = f"7 7 7 A: {asked.answer}\nand more"
    assert judge(rollout(text, checker=asked.checker)) == 1


def test_gym_strict_counts_only_a_full_score() -> None:
    entry = {"question": "q", "answer": "14", "metadata": {}}
    prompt = {"checker": Checker("chain_sum", {}, entry)}
    strict, lenient = (gym(GymReward(kind="reasoning_gym", strict=s)) for s in (True, False))
    partial = lenient(rollout("it is 14", **prompt))
    assert 0 < partial < 1
    assert strict(rollout("it is 14", **prompt)) == 0
    assert strict(rollout("14", **prompt)) == lenient(rollout("14", **prompt)) == 1


def failing(_: Rollout) -> float:
    raise KeyError("oops")


FAULTS = [
    (failing, "KeyError: 'oops'"),
    (lambda _: math.nan, "returned nan"),
    (lambda _: -math.inf, "returned -inf"),
    (lambda _: "much", "ValueError: could not convert"),
    (lambda _: None, "TypeError: "),
    (gym(GymReward(kind="reasoning_gym")), "ValueError: the prompt does not come from a reason"),
    (exact(ExactReward(kind="exact")), "ValueError: the prompt has no answer"),
    (numeric(NumericReward(kind="numeric")), "ValueError: the prompt has no answer"),
]


@pytest.mark.parametrize(("judge", "fault"), FAULTS)
def test_a_failing_judge(judge, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (score,) = Judged(judge, "mine", "zero").score([rollout("said", uid="v/0:9")])
    assert (score.value, score.source) == (0.0, "mine")
    assert score.fault is not None
    assert score.fault.startswith(fault)
    assert "reward mine failed on v/0:9, response 'said'" in caplog.text
    with pytest.raises(InputError) as error:
        Judged(judge, "mine", "error").score([rollout("said", uid="v/0:9")])
    assert str(error.value).startswith("reward mine failed on v/0:9, response 'said': " + fault)


def test_a_fault_spoils_its_own_rollout_alone() -> None:
    judged = Judged(lambda r: 1 / int(r.text), "inverse", "zero")
    scores = judged.score([rollout("2"), rollout("0"), rollout("4")])
    assert [s.value for s in scores] == [0.5, 0.0, 0.25]
    assert [s.fault is None for s in scores] == [True, False, True]


def test_weighted_sum() -> None:
    length = Judged(lambda r: len(r.text), "length", "zero")
    inverse = Judged(lambda r: 1 / int(r.text), "inverse", "zero")
    scores = WeightedSum([(2.0, inverse), (-0.5, length)]).score([rollout("10"), rollout("000")])
    assert [s.value for s in scores] == pytest.approx([0.2 - 1.0, -1.5])
    assert {s.source for s in scores} == {"inverse+length"}
    assert [s.fault for s in scores] == [None, "ZeroDivisionError: division by zero"]


def test_without_one_of_its_parts_there_is_no_sum() -> None:
    class Away:
        def score(self, rollouts: list[Rollout]) -> list[Score | Dropped]:
            return [Dropped("away") if r.text == "b" else Score(1.0, "there") for r in rollouts]

    length = Judged(lambda r: len(r.text), "length", "zero")
    found = WeightedSum([(1.0, length), (2.0, Away())]).score([rollout("aa"), rollout("b")])
    assert found == [Score(4.0, "length+there"), Dropped("away")]


def test_by_origin_keeps_the_order() -> None:
    asked: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def score(self, rollouts: list[Rollout]) -> list[Score]:
            asked.extend(f"{self.name} {r.text}" for r in rollouts)
            return [Score(float(r.text), self.name) for r in rollouts]

    source = ByOrigin({"labelled": Named("L"), "unlabelled": Named("U"), "verifiable": Named("V")})
    mixed = [("1", "verifiable"), ("2", "labelled"), ("3", "verifiable"), ("4", "labelled")]
    scores = source.score([rollout(text, origin=origin) for text, origin in mixed])
    assert [(s.value, s.source) for s in scores] == [(1, "V"), (2, "L"), (3, "V"), (4, "L")]
    assert asked == ["L 2", "L 4", "V 1", "V 3"]
    assert source.score([]) == []


def test_a_weighted_sum_of_full_marks_is_full_marks() -> None:
    """0.7 + 0.2 + 0.1 is not 1 in floating point."""
    for weights in ((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.1,) * 10):
        full = Judged(lambda _: 1.0, "full", "error")
        (score,) = WeightedSum([(weight, full) for weight in weights]).score([rollout("a")])
        assert score.is_right
    assert not Score(0.999, "x").is_right


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("12", "so it is 12", "13"),
        ("1,000", r"\boxed{1000}", r"\boxed{100}"),
        ("1/2", r"\boxed{0.5}", r"\boxed{2}"),
        (r"\frac12", r"\boxed{\frac{1}{2}}", r"\boxed{12}"),
        (r"2\pi", r"\boxed{2\pi}", r"\boxed{2}"),
        (r"\sqrt{3}", r"\boxed{\sqrt3}", r"\boxed{3}"),
        (r"3\sqrt2", r"$3\sqrt{2}$", r"\boxed{3}"),
        ("(1,2)", r"\boxed{(1,2)}", r"\boxed{(2,1)}"),
        ("A", r"\boxed{A}", r"\boxed{B}"),
        ("x^2+1", r"\boxed{1+x^2}", r"\boxed{x^2}"),
        (r"\text{even}", r"\boxed{\text{even}}", r"\boxed{\text{odd}}"),
        ("$5$", "it is $5$", "$6$"),
        ("12 dollars", r"\boxed{12}", r"\boxed{13}"),
        ("-2, 1", r"\boxed{-2, 1}", r"\boxed{1}"),
        ("2x+3", r"\boxed{2x+3}", r"\boxed{2}"),
        ("5x", r"\boxed{5x}", r"\boxed{5}"),
        ("3+4i", r"\boxed{3+4i}", r"\boxed{3}"),
        ("x + 3", r"\boxed{x + 3}", r"\boxed{3}"),
        ("50%", r"\boxed{50\%}", r"\boxed{5}"),
        ("-3", r"\boxed{-3}", r"\boxed{3}"),
        ("Paris", r"\boxed{Paris}", r"\boxed{Rome}"),
    ],
)
def test_mathematics(answer: str, right: str, wrong: str) -> None:
    assert is_same_mathematics(right, answer)
    assert not is_same_mathematics(wrong, answer)


def test_an_answer_that_is_no_mathematics_is_a_fault() -> None:
    with pytest.raises(ValueError, match="cannot read the answer"):
        is_same_mathematics("12", "")


def test_a_users_file_may_have_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Mark:\n    value: float\n"
        "def score(prompt, response, answer):\n    return Mark(1.0).value\n"
    )
    assert load_function(str(file), "score")("", "", None) == 1.0
