"""A run that goes on with other learners, at another ZeRO stage, or with other offload."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ppo_dist import build
from ppo_dist.config import Config
from ppo_dist.run import train
from tests.conftest import raw_config
from tests.ray.test_same_numbers import assert_same

OPTIMIZERS = {
    "adamw": {"kind": "adamw", "eps": 1e-2, "weight_decay": 0.1},
    "sgd": {"kind": "sgd", "momentum": 0.9},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "critic": {},
    "shared": {"critic": {"shared": True}},
    "lora": {"model": {"lora": {"rank": 4}}, "reference": {"reset": "never"}},
}


def made(
    folder: Path, steps: int, variant: str = "critic", max_lag: int = 0, **learner: Any
) -> Config:
    kind = "local" if learner.get("workers", 1) == 1 else "ray"
    rollout = {"workers": learner.get("workers", 1)}
    sections = {k: {**v} for k, v in VARIANTS[variant].items()}
    return Config.model_validate(
        raw_config(
            folder,
            learner={"optimizer": OPTIMIZERS["adamw"], **learner},
            train={"steps": steps},
            eval={"every": 1},
            stream={"max_lag": max_lag},
            cluster={"kind": kind},
            rollout=rollout,
            **sections,
        )
    )


def run(config: Config, resume: bool = False) -> list[Any]:
    assert train(config, resume, Console(quiet=True)) == 0
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def saved(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """By kind and parameter, whole, whoever wrote it."""
    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            name, _, start = key.rpartition("@")
            pieces[path.name.rpartition("-")[0], name].append((int(start), tensor))
    return {
        key: torch.cat([part for _, part in sorted(own, key=lambda one: one[0])])
        if own[0][1].dim()
        else own[0][1]
        for key, own in pieces.items()
    }


def assert_goes_on(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two steps in one way and one more in another are three steps."""
    alike = {k: before[k] for k in before if k in ("optimizer", "max_lag")}
    expected = run(made(folder / "whole", 3, **alike))
    run(made(folder / "parts", 2, **before))
    rows = run(made(folder / "parts", 3, **after), resume=True)
    assert_same(rows, expected)
    events = (folder / "parts" / "events.jsonl").read_text().splitlines()
    (told,) = [e for e in map(json.loads, events) if e["event"] == "resumed"]
    assert told["learners"] == {
        "before": before.get("workers", 1), "now": after.get("workers", 1)
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("max_lag", [0, 1])
def test_one_learner_and_then_two_at_another_stage(
    ray_session: None, tmp_path: Path, max_lag: int
) -> None:
    """With a lag the checkpoint has responses that no step has learned from yet."""
    lag = {"max_lag": max_lag}
    assert_goes_on(tmp_path, {"zero_stage": 1, **lag}, {"zero_stage": 3, "workers": 2, **lag})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("stage", range(4))
def test_other_numbers_of_learners(
    ray_session: None, tmp_path: Path, stage: int, was: int, now: int, optimizer: str
) -> None:
    common = {"zero_stage": stage, "optimizer": OPTIMIZERS[optimizer]}
    assert_goes_on(tmp_path, {**common, "workers": was}, {**common, "workers": now})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_optimizer_are_the_same_bits_wherever_they_are_loaded(
    ray_session: None, tmp_path: Path, variant: str, dtype: str
) -> None:
    """Saved, loaded by others, saved again: nothing has changed."""
    common = {"variant": variant, "dtype": dtype}
    config = made(tmp_path / "run", 2, zero_stage=2, workers=2, **common)
    run(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    layouts = [(1, 1, "cpu"), (3, 3, "none"), (2, 2, "cpu"), (3, 1, "cpu"), (1, 3, "none")]
    if dtype == "fp32":
        layouts += [(0, 1, "none"), (0, 2, "none")]
    for number, (stage, workers, offload) in enumerate(layouts):
        other = made(
            tmp_path / f"{number}", 2, zero_stage=stage, workers=workers, offload=offload, **common
        )
        model_path = build.model_folder(config, build.check(config))
        again = tmp_path / f"again-{number}"
        again.mkdir()
        with build.cluster(other), build.learners(other, model_path, checkpoint) as group:
            group.save(checkpoint=again)
        engines = ["policy", "critic"] if variant != "shared" else ["policy"]
        for engine in engines:
            first, second = saved(checkpoint / engine), saved(again / engine)
            assert {kind for kind, _ in first} == {"weights", "exp_avg", "exp_avg_sq", "step"}
            assert first.keys() == second.keys()
            for key, tensor in first.items():
                assert torch.equal(second[key], tensor), (stage, workers, offload, key)
        checkpoint = again  # a chain: what the next one reads, this one wrote
