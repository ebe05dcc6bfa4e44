"""Semi-supervised runs with real parts: what is kept from training, resume, what the guard does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from ppo_dist import build
from ppo_dist.config import Config
from ppo_dist.run import train
from tests.conftest import raw_config
from tests.e2e.test_run import numbers

WORDS = ["abc", "dead", "bead", "cab", "fade", "face", "deaf", "bad", "cafe", "ebb", "add", "fab"]


def rows(path: Path, words: list[str], answers: list[str] | None) -> str:
    made = [{"prompt": f"{word}>"} for word in words]
    if answers is not None:
        made = [{**r, "answer": a, "response": a} for r, a in zip(made, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def parity(text: str) -> str:
    """An answer on which three responses of an untrained model always have a majority."""
    return "even" if len(text) % 2 == 0 else "odd"


def is_even(prompt: str, response: str, answer: str) -> float:
    """A checker that an untrained model satisfies now and then."""
    return float(parity(response) == "even" and bool(answer))


def semi(folder: Path, steps: int = 7, **sections: Any) -> dict[str, Any]:
    """Votes, a trajectory gate in its warm-up for four steps, pseudo-labels, an adaptive μ."""
    words = raw_config(folder)["data"]["labelled"]
    adaptive = {"kind": "adaptive", "start": 0.5, "low": 0.1, "high": 1.0}
    defaults: dict[str, Any] = {
        "train": {"steps": steps},
        "eval": {"every": 1},
        "data": {"verifiable": [], "unlabelled": {**words, "size": 2, "seed": 5}},
        "reward": {
            "unlabelled": {
                "kind": "vote",
                "extract": {"kind": "function", "path": __file__, "name": "parity"},
            },
            "labelled": {"kind": "function", "path": __file__, "name": "is_even"},
            "verifiable": None,
        },
        "mix": {
            "prompts": 12,
            "shares": {"labelled": 1, "unlabelled": 2, "verifiable": 0},
            "schedule": {"kind": "supervised_first", "steps": 1, "then": adaptive},
        },
        "rollout": {"group_size": 3},
        "semi": {
            "gate": {"kind": "trajectory", "window": 2, "warmup": 2, "threshold": 0.0},
            "pseudo": {"batch": 2, "capacity": 3, "max_age": 2, "min_reward": 0.5,
                       "origins": ["labelled", "unlabelled"]},
            "probe": 0.25,
        },
        "learner": {"optimizer": "adamw", "lr": 1e-3, "critic_lr": 1e-3},
    }  # fmt: skip
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section}
    return raw_config(folder, **defaults)


def run(raw: dict[str, Any], resume: bool = False) -> int:
    return train(Config.model_validate(raw), resume, Console(quiet=True))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_answers_of_unlabelled_prompts_change_nothing(tmp_path: Path) -> None:
    """Three runs on files that differ in those answers alone: none, the right ones, wrong ones."""
    right = [word[::-1] for word in WORDS]
    folders = []
    for name, answers in (("none", None), ("right", right), ("wrong", right[1:] + right[:1])):
        folder = tmp_path / name
        unlabelled = rows(tmp_path / f"{name}.jsonl", WORDS, answers)
        raw = semi(folder, 4, semi={"gate": "all"}, data={"unlabelled": unlabelled})
        checked = build.check(Config.model_validate(raw))
        assert all(
            (r.answer, r.response, r.checker) == (None, None, None)
            for r in checked.prompts["unlabelled"]
        )
        assert run(raw) == 0
        folders.append(folder)
    first, *others = folders
    assert any(row["semi/policy_tokens/unlabelled"] for row in numbers(first))
    for other in others:
        assert numbers(other) == numbers(first)
        one, two = (load_file(f / "policy" / "model.safetensors") for f in (first, other))
        assert all(one[name].equal(two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(semi(folder)) == 0
    return folder


def test_every_part_tells_of_itself(whole: Path) -> None:
    told = numbers(whole)
    assert [bool(row["semi/admitted_share"]) for row in told[1:]] == [False] * 5 + [True] * 2
    assert told[-1]["pseudo/size"] == 3 and told[-1]["pseudo/tokens"] > 0
    assert len({row["semi/mu"] for row in told[2:]}) > 2
    for key in ("pseudo/vote_share", "pseudo/abstain_rate", "pseudo/reward_accuracy_probe"):
        assert all(row[key] is not None for row in told[3:]), key
    assert all(row["eval/held_out/nll"] > 0 for row in told)
    sample = json.loads((whole / "samples.jsonl").read_text().splitlines()[-1])
    assert {"origin", "source", "answer", "vote_share"} <= set(sample)


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resumed_equals_uninterrupted(tmp_path: Path, whole: Path, stop: int) -> None:
    """In the gate's warm-up, within a window with pseudo-labels held, and after its first
    decision.
    """
    assert run(semi(tmp_path / "run", stop)) == 0
    assert run(semi(tmp_path / "run"), resume=True) == 0
    assert numbers(tmp_path / "run") == numbers(whole)


def watched(folder: Path, action: str, **guard: Any) -> dict[str, Any]:
    """A run on votes alone that leaves its reference at once."""
    limits = {"kl": {"limit": 1e-4, "action": action, "patience": 2}, "gap": None, **guard}
    return semi(
        folder,
        semi={"gate": "all", "pseudo": None, "probe": 0, "guard": limits},
        mix={"schedule": 0.1, "shares": {"unlabelled": 1, "verifiable": 0}},
        learner={"optimizer": "adamw", "lr": 0.02},
    )


def fired(folder: Path, action: str) -> int:
    """The first step in which the guard did something; its alert and its number say the same."""
    row = next(row for row in numbers(folder) if row["guard/action"])
    alert = next(e for e in events(folder) if e["event"] == "alert")
    assert (alert["step"], alert["title"]) == (row["step"], f"guard: {action}")
    assert "guard.kl is" in alert["text"] and "its limit is 0.0001" in alert["text"]
    return int(row["step"])


def test_the_guard_warns(tmp_path: Path) -> None:
    assert run(watched(tmp_path, "warn")) == 0
    assert fired(tmp_path, "warn") < 6


def test_the_guard_raises_mu(tmp_path: Path) -> None:
    assert run(watched(tmp_path, "raise_mu", raise_by=3)) == 0
    step = fired(tmp_path, "raise_mu")
    mus = [row["semi/mu"] for row in numbers(tmp_path)]
    assert mus[step] == 0.1 and mus[step + 1] == pytest.approx(0.3)


def test_the_guard_freezes(tmp_path: Path) -> None:
    assert run(watched(tmp_path, "freeze", freeze_steps=1)) == 0
    step = fired(tmp_path, "freeze")
    tokens = [row["rollout/tokens"] for row in numbers(tmp_path)]
    assert tokens[step] > 0 and tokens[step + 1] == 0 and tokens[step + 2] > 0


def test_the_guard_stops(tmp_path: Path) -> None:
    assert run(watched(tmp_path, "stop")) == 3
    step = fired(tmp_path, "stop")
    assert numbers(tmp_path)[-1]["step"] == step
    assert events(tmp_path)[-1]["event"] == "stopped"
    assert (tmp_path / "checkpoints" / f"step-{step:08d}").exists()


def test_the_guard_rolls_back(tmp_path: Path) -> None:
    raw = watched(tmp_path / "a", "roll_back")
    raw["mix"]["labelled_batch"] = 0
    raw["train"]["checkpoint_every"] = 1  # the best one is not the newest, and outlives the others
    assert run(raw) == 0
    step = fired(tmp_path / "a", "roll_back")
    told = numbers(tmp_path / "a")
    (back,) = [e for e in events(tmp_path / "a") if e["event"] == "rolled_back"]
    best = max(row["eval/held_out/accuracy"] for row in told)
    assert (back["step"], back["to_step"]) == (step, 0), "nothing is right before, or after"
    assert [row["step"] for row in told] == list(range(8)), "a row a step, and time goes on"
    assert told[step]["eval/held_out/nll"] == told[0]["eval/held_out/nll"], (
        "of what it went back to"
    )
    assert told[step]["guard/action"] == 4.0 and told[-1]["eval/held_out/accuracy"] == best
    # with nothing but votes to learn from, and these frozen, it stays where it went back to
    one, two = (
        load_file(tmp_path / "a" / n / "model.safetensors") for n in ("policy", "policy-best")
    )
    assert all(one[name].equal(two[name]) for name in one)
    # and a stop after it is resumed exactly
    again = watched(tmp_path / "b", "roll_back")
    again["mix"]["labelled_batch"] = 0
    again["train"]["steps"] = step + 1
    assert run(again) == 0
    again["train"]["steps"] = 7
    assert run(again, resume=True) == 0
    assert numbers(tmp_path / "b") == told


def test_a_held_out_question_among_those_learned_is_refused(tmp_path: Path) -> None:
    from ppo_dist.config import InputError

    held_out = rows(tmp_path / "held_out.jsonl", ["DEAD", "zzz"], ["daed", "zzz"])
    unlabelled = rows(tmp_path / "u.jsonl", WORDS, None)
    raw = semi(tmp_path / "run", data={"held_out": held_out, "unlabelled": unlabelled})
    with pytest.raises(InputError, match=r"1 prompts of data.held_out are also in data.unlabelled"):
        run(raw)
    assert not (tmp_path / "run").exists()


def collapsing(folder: Path, guard: dict[str, Any]) -> list[dict[str, Any]]:
    """A small model that knows some words, then is rewarded by the majority of 8 alone."""
    words = raw_config(folder)["data"]["labelled"]
    first = {"kind": "supervised_first", "steps": 12, "then": 0.0}
    raw = raw_config(
        folder,
        train={"steps": 32},
        model={"scratch": {"layers": 2, "hidden": 96, "heads": 4, "context": 16}},
        data={
            "labelled": {**words, "size": 200},
            "verifiable": [],
            "unlabelled": {**words, "size": 400, "seed": 2},
            "held_out": {**words, "size": 200, "seed": 3, "split": "held_out"},
        },
        reward={"unlabelled": "vote", "verifiable": None},
        mix={
            "schedule": first,
            "prompts": 48,
            "shares": {"unlabelled": 1, "verifiable": 0},
            "labelled_batch": 64,
        },
        semi={"guard": guard},
        algorithm={"minibatches": 4, "kl": 0.0, "advantage": "group_mean"},
        rollout={"group_size": 8, "chunk": 512},
        learner={
            "micro_batch_tokens": 4096,
            "optimizer": "adamw",
            "lr": {"kind": "piecewise", "values": [[0, 2e-3], [12, 1e-3]]},
            "max_grad_norm": 1.0,
        },
        eval={"every": 4, "samples": 0},
    )
    assert run(raw) == 0
    return numbers(folder)


@pytest.mark.slow
def test_votes_alone_collapse_and_the_guard_keeps_the_best(tmp_path: Path) -> None:
    told = collapsing(tmp_path / "alone", {"gap": None, "drop": None})
    accuracies = [a for row in told if (a := row["eval/held_out/accuracy"]) is not None]
    assert max(accuracies) > 0.6 and accuracies[-1] < max(accuracies) - 0.1
    assert told[-1]["reward/unlabelled/mean"] > 0.8, "while its own reward rises"
    drop = {"limit": 0.04, "action": "roll_back"}
    told = collapsing(tmp_path / "guarded", {"gap": None, "drop": drop})
    accuracies = [a for row in told if (a := row["eval/held_out/accuracy"]) is not None]
    assert accuracies[-1] >= max(accuracies) - 0.02
    assert any(event["event"] == "rolled_back" for event in events(tmp_path / "guarded"))
