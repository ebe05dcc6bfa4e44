"""The verifiers of reasoning-gym tasks."""

from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from typing import Any

from ppo_dist.config.reward import GymReward
from ppo_dist.rewards.extract import extractor, in_time
from ppo_dist.rewards.rules import Judge
from ppo_dist.types import Rollout

# these verifiers run the answer as Python: with `eval`, or with sympy's `parse_expr`, which uses it
EVALUATE_LISTS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
EVALUATE_FORMULAS = {
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24",
    "simple_integration",
}  # fmt: skip
FUNCTIONS = {
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt",
    "Abs", "pi",
}  # fmt: skip
NAME, POWER = re.compile(r"[^\W\d]\w*"), re.compile(r"\*\*|\^")
EXPONENT = re.compile(r"\s*(?:-?(\d{1,4})|\(\s*-?(\d{1,3})\s*(?:/\s*\d{1,3}\s*)?\))(?![\w.(])")
MOST_DIGITS = 1_000_000
LITERALS = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Set, ast.Dict,
    ast.UnaryOp, ast.USub, ast.UAdd,
)  # fmt: skip


def gym(rule: GymReward) -> Judge:
    """The task's own score of the extracted answer; 0 for one that is code where a number, a
    formula or a list was asked for.

    Some tasks give part of a point for a text that merely contains the answer, or for none at all:
    with `strict`, all but a full score is 0.
    """
    extract = extractor(rule.extract)

    def judge(rollout: Rollout) -> float:
        checker = rollout.prompt.checker
        if checker is None:
            raise ValueError("the prompt does not come from a reasoning-gym source")
        found = extract(rollout.text)
        if found is None or not is_harmless(checker.task, found, str(checker.entry["answer"])):
            return 0.0
        task = _task(checker.task, json.dumps(checker.options))
        score = in_time(lambda: float(task.score_answer(found, checker.entry)))
        # some scores add up parts to slightly more than 1 for an answer that goes on after its end
        return float(score == 1.0) if rule.strict else min(score, 1.0)

    return judge


def is_harmless(task: str, text: str, answer: str) -> bool:
    """Whether a verifier may see a text: one that evaluates what it gets sees literals, or
    arithmetic with the names of the right answer, alone.
    """
    if task in EVALUATE_LISTS:
        return _is_literal(text)
    return task not in EVALUATE_FORMULAS or _is_formula(text, set(NAME.findall(answer)))


def _is_literal(text: str) -> bool:
    """Whether Python would read a literal, or a single name, or nothing at all, out of it."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return all(isinstance(node, LITERALS) for node in ast.walk(tree))


def _is_formula(text: str, names: set[str]) -> bool:
    """Whether it is arithmetic of names, numbers and functions, without a number that is huge."""
    if not re.fullmatch(r"[\w\s+\-*/^().,]{1,1000}", text) or re.search(r"\.\s*[^\W\d]", text):
        return False
    if not set(NAME.findall(text)) <= names | FUNCTIONS | {"C"}:
        return False
    base, *powers = POWER.split(text)
    plain, nested = 1, 1
    for number, after in enumerate(powers, start=1):
        found = EXPONENT.match(after)
        is_tower = found is not None and number < len(powers) and not after[found.end() :].strip()
        if found is None or is_tower:
            return False
        exponent = max(1, int(found[1] or found[2]))
        if base.rstrip().endswith(")"):
            nested *= exponent  # of powers, perhaps
        else:
            plain = max(plain, exponent)
        base = after
    digits = max(map(len, re.findall(r"\d+", text)), default=1)
    return digits * plain * nested <= MOST_DIGITS


@lru_cache(maxsize=64)
def _task(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(options))
