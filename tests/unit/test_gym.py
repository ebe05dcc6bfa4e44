"""What a verifier of reasoning-gym may see of a response: some would run it."""

from __future__ import annotations

import ast
import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_dist.config.data import GymSource
from ppo_dist.config.reward import GymReward, RegexReward
from ppo_dist.data.readers import rows_of
from ppo_dist.rewards.extract import in_time
from ppo_dist.rewards.gym import EVALUATE_FORMULAS, EVALUATE_LISTS, gym, is_harmless
from ppo_dist.rewards.rules import Judged, regex
from ppo_dist.types import Checker, Prompt, Rollout

# their verifiers evaluate what stands in the entry, which the task itself has made, or run code of
# the package when questions are made
SOUND = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "gsm_symbolic", "number_sorting"}
ATTACKS = [
    "open('{trace}', 'w')",
    "[open('{trace}', 'w')]",
    "[print(1) for _ in [open('{trace}', 'w')]]",
    "__import__('os').system('touch {trace}')",
    "().__class__.__base__.__subclasses__()",
    "exec(chr(112)+chr(97))",
    "(lambda: open('{trace}', 'w'))()",
    "f\"{{open('{trace}', 'w')}}\"",
    "x if open('{trace}', 'w') else x",
    "C.__class__",
    "1 .real",
    "S(1)",
    "input()",
    "9**9**9**9",
    "9 ^ 9 ^ 9",
    "9**(9**9)",
    "((9**999)**999)**999",
    "9**2_000_000",
    "9**99999999",
    "99999!",
    "x**(9)**9",
    "eval",
    "ｅval(1)",
]


def entry_of(task: str, number: int = 0) -> dict[str, Any]:
    import reasoning_gym

    found: dict[str, Any] = reasoning_gym.create_dataset(task, seed=7, size=number + 1)[number]
    return found


def rollout(text: str, task: str, entry: dict[str, Any]) -> Rollout:
    prompt = Prompt("v:0", "verifiable", "q", np.ones(1, np.int64), None, Checker(task, {}, entry))
    none = np.zeros(0, np.float32)
    return Rollout(prompt, 0, none.astype(np.int64), none, text, "eos", 0)


@pytest.mark.parametrize("task", ["rearc", "spell_backward"])
def test_a_task_s_own_answer_is_right_as_it_is_read(task: str) -> None:
    """Verifiers may compare with tuples."""
    source = GymSource(kind="reasoning_gym", task=task, size=2, split="train")
    judge = gym(GymReward(kind="reasoning_gym"))
    for _, fields, checker in rows_of(source):
        assert checker is not None
        assert judge(rollout(str(fields["answer"]), task, checker.entry)) == 1.0


SLOW = pytest.mark.slow
EVALUATE = sorted(EVALUATE_LISTS | EVALUATE_FORMULAS)
SOME = [pytest.param(t, marks=[] if t in ("n_queens", "countdown") else SLOW) for t in EVALUATE]


@pytest.mark.parametrize("task", SOME)
def test_a_response_is_never_run(task: str, tmp_path: Path) -> None:
    entry, judge = entry_of(task), gym(GymReward(kind="reasoning_gym", strict=False))
    begin = time.monotonic()
    for attack in ATTACKS:
        text = attack.format(trace=tmp_path / "trace")
        if task in EVALUATE_FORMULAS:
            assert not is_harmless(task, text, str(entry["answer"])), text
        assert judge(rollout(text, task, entry)) < 1, text
        assert not (tmp_path / "trace").exists(), text
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("task", SOME)
def test_right_answers_are_still_right(task: str) -> None:
    judge = gym(GymReward(kind="reasoning_gym"))
    for number in range(10):
        entry = entry_of(task, number)
        if task == "puzzle24" and entry["answer"] is None:
            continue
        assert judge(rollout(str(entry["answer"]), task, entry)) == 1, entry["answer"]


def test_lists_are_still_read() -> None:
    judge = gym(GymReward(kind="reasoning_gym", strict=False))
    entry = entry_of("spiral_matrix")
    as_list = str([int(x) for x in entry["answer"].split()])
    assert judge(rollout(as_list, "spiral_matrix", entry)) > 0
    assert is_harmless("n_queens", "_ Q _ _\n_ _ _ Q\nQ _ _ _\n_ _ Q _", "")
    assert is_harmless("n_queens", "[['_', 'Q'], ['Q', '_']]", "")


@SLOW
def test_the_tasks_that_evaluate_are_these() -> None:
    """Of the version of reasoning-gym that is installed."""
    import reasoning_gym

    found = set()
    for path in sorted(Path(inspect.getfile(reasoning_gym)).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.split(".")[-1] in ("eval", "exec", "parse_expr", "sympify"):
                found.add("gsm_symbolic" if "gsm_symbolic" in path.parts else path.stem)
    found.discard("propositional_logic")  # its `parse_expr` is its own
    assert found == EVALUATE_LISTS | EVALUATE_FORMULAS | SOUND


def test_a_judge_that_takes_for_ever_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_dist.rewards.extract.PATIENCE_S", 0.2)
    judge = regex(RegexReward(kind="regex", pattern=r"^(a|a)*$"))
    begin = time.monotonic()
    (score,) = Judged(judge, "regex", "zero").score([rollout("a" * 60 + "b", "", {})])
    assert time.monotonic() - begin < 5
    assert score.value == 0 and score.fault == "TimeoutError: took longer than 0.2 s"
    assert in_time(lambda: 7) == 7
