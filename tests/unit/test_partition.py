"""Who may see which rows."""

from __future__ import annotations

import re

import pytest

from ppo_dist.config.base import InputError
from ppo_dist.data.partition import parted, refuse_overlap, without_answer
from ppo_dist.data.sources import Row


def row(number: int, prompt: str | list[dict[str, str]]) -> Row:
    return Row(f"u:{number}", f"f.jsonl, line {number}", prompt, "r", "a", None)


def test_no_overlap_is_fine() -> None:
    refuse_overlap("held_out", [row(1, "a b")], "labelled", [row(2, "ab"), row(3, "a b c")])
    refuse_overlap("held_out", [], "labelled", [])


@pytest.mark.parametrize("prompt", ["Naïve  QUESTION?\n", "naïve question?", "ＮAÏVE question?"])
def test_an_overlap_shows_where(prompt: str) -> None:
    with pytest.raises(InputError) as error:
        refuse_overlap(
            "held_out", [row(1, "other"), row(2, "naïve Question?")], "unlabelled", [row(7, prompt)]
        )
    said = str(error.value)
    assert said.startswith("1 prompts of data.held_out are also in data.unlabelled")
    assert "f.jsonl, line 2 = f.jsonl, line 7 ('naïve Question?')" in said


def test_chats_are_compared_by_roles_and_contents() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match="are also in"):
        refuse_overlap(
            "test", [row(1, chat)], "labelled", [row(2, [{**chat[0], "content": "hi "}])]
        )
    refuse_overlap("test", [row(1, chat)], "labelled", [row(2, [{**chat[0], "role": "system"}])])


def test_only_some_examples_are_shown() -> None:
    rows = [row(i, f"q{i}") for i in range(9)]
    with pytest.raises(InputError, match="9 prompts of") as error:
        refuse_overlap("held_out", rows, "labelled", rows)
    assert len(re.findall(" = ", str(error.value))) == 3


def test_the_probe_is_a_random_share_without_answers() -> None:
    rows = [row(i, f"q{i}") for i in range(20)]
    others, probe = parted(rows, 0.25, seed=1)
    assert (len(others), len(probe)) == (15, 5)
    assert sorted([*others, *probe], key=lambda r: int(r.uid[2:])) == rows
    assert parted(rows, 0.25, seed=1)[1] == probe != parted(rows, 0.25, seed=2)[1]
    assert parted(rows, 0.0, seed=1) == (rows, [])
    hidden = without_answer(probe[0])
    assert (hidden.uid, hidden.prompt) == (probe[0].uid, probe[0].prompt)
    assert (hidden.response, hidden.answer, hidden.checker) == (None, None, None)
