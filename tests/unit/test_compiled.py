"""Layers through torch's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ppo_dist import build
from ppo_dist.build import local
from ppo_dist.config import Config, InputError
from ppo_dist.data.batching import pack_rows
from ppo_dist.models.compiled import compile_layers, why_not
from ppo_dist.models.critic import CriticModel, load_critic
from ppo_dist.models.policy import PolicyModel, load_policy
from tests.conftest import TIMINGS, raw_config
from tests.unit.test_reward_model import classifier

LENGTHS = ((9, 6, 12), (5,), (31, 3), (20, 20, 4, 4))  # of the sequences of four rows


def models(path: Path) -> tuple[PolicyModel, CriticModel]:
    """A policy in training, and a critic whose head is not 0."""
    policy = PolicyModel(load_policy(str(path), torch.float32).train(), logits_chunk=7)
    critic = load_critic(str(path), torch.float32).train()
    torch.nn.init.ones_(critic.head.weight)
    return policy, critic


def learned(
    policy: PolicyModel, critic: CriticModel, lengths: tuple[int, ...]
) -> list[torch.Tensor]:
    """What both say of a row, with gradients and without, and the gradients."""
    numbers = np.random.default_rng(sum(lengths))
    row = pack_rows([(numbers.integers(3, 15, length), 2) for length in lengths], end=False)
    *where, targets_K = (torch.as_tensor(a) for a in vars(row).values())
    ones_K = torch.ones(len(targets_K))
    with torch.no_grad():
        before = policy(*where, targets_K, ones_K).logprobs_K
    logprobs_K, values_K = policy(*where, targets_K, ones_K).logprobs_K, critic(*where)
    parameters = [*policy.parameters(), *critic.parameters()]
    found = torch.autograd.grad((logprobs_K.exp() * values_K).sum(), parameters)
    return [before, logprobs_K.detach(), values_K.detach(), *found]


def test_compiled_layers_say_and_learn_the_same(tiny_models: dict[str, Path]) -> None:
    """On rows of any lengths; weights stay under their names, and are compiled once for all."""
    if (error := why_not("cpu")) is not None:
        pytest.skip(f"torch cannot compile here: {error}")
    plain, compiled = models(tiny_models["llama"]), models(tiny_models["llama"])
    names = list(compiled[0].state_dict())
    for trunk in (compiled[0].lm, compiled[1].trunk):
        compile_layers(trunk)
    assert list(compiled[0].state_dict()) == names
    stats = torch._dynamo.utils.counters["stats"]
    before, made = stats["unique_graphs"], []
    for lengths in LENGTHS:
        for expected, found in zip(
            learned(*plain, lengths), learned(*compiled, lengths), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        made.append(stats["unique_graphs"] - before)
    assert 0 < made[0] == made[-1], "a row of other lengths is nothing new"


def test_what_is_not_made_of_layers_is_named() -> None:
    with pytest.raises(ValueError, match="compile: Linear has no layers"):
        compile_layers(torch.nn.Linear(2, 2))


COMPILES = {"learner": {"compile": True}}
JUDGES = {"reward": {"verifiable": {"kind": "model", "path": "", "compile": True}}}


@pytest.mark.parametrize(
    ("kind", "sections", "named"),
    [
        ("local", COMPILES, "learner.compile"),
        pytest.param("ray", COMPILES, "learner.compile", marks=pytest.mark.slow),
        ("local", JUDGES, "compile of the reward model"),
        pytest.param("ray", JUDGES, "compile of the reward model", marks=pytest.mark.slow),
    ],
)
def test_without_a_compiler_it_is_said_before_any_model_loads(
    tmp_path: Path, tiny_models: dict[str, Path], kind: str, sections: dict[str, Any], named: str
) -> None:
    file = tmp_path / "run.yaml"
    config = raw_config(tmp_path / "run", cluster={"kind": kind, "cpus": 3}, **sections)
    if sections is JUDGES:
        config["reward"]["verifiable"]["path"] = str(
            classifier(tmp_path / "rm", tiny_models["llama"])
        )
    file.write_text(yaml.safe_dump(config))
    missing = {
        "CXX": str(tmp_path / "g++"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "ppo_dist", "train", str(file)],
        env={**os.environ, **missing}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert named in done.stderr and "torch cannot compile" in done.stderr
    assert str(tmp_path / "g++") in done.stderr


def test_a_reward_models_compiler_is_tried_before_any_model_loads(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, with learners and without them."""
    base = tiny_models["llama"]
    judge = {"kind": "model", "path": str(classifier(tmp_path / "rm", base)), "compile": True}
    config = Config.model_validate(raw_config(tmp_path, reward={"verifiable": judge}))
    monkeypatch.setattr(local, "cannot_compile", lambda kind: "no compiler")
    for loads in ("LearnerWorker", "engine", "RewardModel"):
        monkeypatch.setattr(local, loads, None)
    for start in (build.learners(config, str(base), None), build.rollout_pool(config, str(base))):
        with pytest.raises(InputError, match=r"the reward model .*rm: no compiler"), start:
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "sections"),
    [
        ({"zero_stage": 0}, {}),
        ({"zero_stage": 2, "workers": 2}, {"cluster": {"kind": "ray", "cpus": 4}}),
        ({"zero_stage": 2, "gradient_checkpointing": True}, {}),
        (
            {"zero_stage": 1},
            {"model": {"lora": {"rank": 2, "alpha": 4}}, "reference": {"reset": "never"}},
        ),
    ],
)
def test_compiled_runs_are_those_that_are_not_and_resume_exactly(
    tmp_path: Path, learner: dict[str, Any], sections: dict[str, Any]
) -> None:
    """Each process compiles anew, and sees rows of other lengths first."""

    def rows(name: str, *steps: int, **section: Any) -> list[dict[str, Any]]:
        for number, last in enumerate(steps):
            raw = raw_config(
                tmp_path / name,
                train={"steps": last},
                eval={"every": 1},
                learner={**learner, **section},
                **sections,
            )
            file = tmp_path / f"{name}.yaml"
            file.write_text(yaml.safe_dump(raw))
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{name}-{number}")}
            command = [sys.executable, "-m", "ppo_dist", "train", str(file)]
            command += ["--resume"] if number else []
            subprocess.run(command, env={**os.environ, **cache}, check=True, capture_output=True)
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in found]

    plain, compiled = rows("plain", 4), rows("compiled", 4, compile=True)
    trial = "from ppo_dist.models.compiled import why_not; assert why_not('cpu') is None"
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "trial")}
    subprocess.run([sys.executable, "-c", trial], env={**os.environ, **cache}, check=True)
    counts = [len(list((tmp_path / n).rglob("*.so"))) for n in ("trial", "compiled-0")]
    assert 0 < counts[0] < counts[1], "its layers were compiled, beside what the trial compiles"
    assert rows("stopped", 2, 4, compile=True) == compiled
    for expected, found in zip(plain, compiled, strict=True):
        numbers = {name: value for name, value in expected.items() if value is not None}
        assert found.keys() == expected.keys()
        assert {n: found[n] for n in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)
