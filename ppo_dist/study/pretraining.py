"""Examples of simple work on strings: what the base model of the label-efficiency study has read.

python -m ppo_dist.study.pretraining OUT.jsonl

Digits are reversed, digits and letters are copied, the ones in decimal numbers are counted: never
words, never binary numbers. So the tasks of the study are new to the model, but not what they are
made of, and a few labels bring them out, as with a base model.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def examples(seed: int) -> list[dict[str, str]]:
    """Rows with `prompt` and `response`, shuffled."""
    draw = random.Random(seed)

    def text(alphabet: str) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(3, 8)))

    def ones() -> str:
        share = draw.random()
        return "".join(
            "1" if draw.random() < share else draw.choice("023456789")
            for _ in range(draw.randint(4, 16))
        )

    kinds: list[tuple[int, Callable[[], str], str, Callable[[str], str]]] = [
        (9000, lambda: text(string.digits), ">", lambda number: number[::-1]),
        (3000, lambda: text(string.digits), "=", str),
        (12000, lambda: text(string.ascii_letters), "=", str),
        (12000, ones, "#", lambda number: str(number.count("1"))),
        (3000, lambda: "0b" + text("01"), "=", str),
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
