"""Examples of simple work on strings: what the base model of the label-efficiency study has read.

python -m ppo_dist.study.pretraining OUT.jsonl

Digits are reversed, letters and digits are copied, crosses are counted. No task of the study is
among them, but what they are made of is: so a few labels bring the tasks out, as with a base model.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

LETTERS = string.ascii_lowercase * 2 + string.ascii_uppercase


def examples(seed: int) -> list[dict[str, str]]:
    """Rows with `prompt` and `response`, shuffled."""
    draw = random.Random(seed)

    def text(alphabet: str, shortest: int, longest: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(shortest, longest)))

    def crosses() -> str:
        share = draw.random()
        return "".join(draw.choices("xo", [share, 1 - share], k=draw.randint(4, 16)))

    kinds: list[tuple[int, Callable[[], str], str, Callable[[str], str]]] = [
        (9000, lambda: text(string.digits, 3, 8), ">", lambda word: word[::-1]),
        (6000, lambda: text(string.digits, 3, 8), "=", str),
        (9000, lambda: text(LETTERS, 3, 8), "=", str),
        (6000, crosses, "#", lambda word: str(word.count("x"))),
        (3000, lambda: "0b" + text("01", 3, 8), "=", str),
    ]
    rows = []
    for count, make, mark, answer in kinds:
        for word in (make() for _ in range(count)):
            rows.append({"prompt": word + mark, "response": answer(word)})
    draw.shuffle(rows)
    return rows


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    name = "python -m ppo_dist.study.pretraining"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("out", type=Path, help="the .jsonl file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = examples(arguments.seed)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
