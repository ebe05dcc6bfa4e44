"""Who may see which rows: no evaluation on what is learned from, and a probe without answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ppo_dist.config.base import InputError
from ppo_dist.data.sources import Row

EXAMPLES = 3
PROBE = 104729  # keeps these random numbers apart from those of the data's order


def refuse_overlap(name: str, evaluated: Sequence[Row], other: str, learned: Sequence[Row]) -> None:
    """Checks that no prompt is both evaluated and learned from: case, white space and Unicode form
    aside.

    Raises:
        InputError: some are; shows the first ones.
    """
    known = {_normalised(row): row for row in learned}
    found = [(row, known[key]) for row in evaluated if (key := _normalised(row)) in known]
    if found:
        shown = "; ".join(
            f"{one.where} = {two.where} ({str(one.prompt)[:60]!r})" for one, two in found[:EXAMPLES]
        )
        raise InputError(
            f"{len(found)} prompts of data.{name} are also in data.{other}, so the evaluation would"
            f" be of what was learned: {shown}"
        )


def _normalised(row: Row) -> str:
    prompt = row.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def parted(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(the others, the probe): a random share of the labelled rows, in their order."""
    chosen = np.random.default_rng([seed, PROBE]).permutation(len(rows))
    probe = set(chosen[: round(share * len(rows))].tolist())
    return (
        [row for i, row in enumerate(rows) if i not in probe],
        [row for i, row in enumerate(rows) if i in probe],
    )


def without_answer(row: Row) -> Row:
    """The row as an unlabelled one: nothing that tells its answer is left."""
    return replace(row, response=None, answer=None, checker=None)
