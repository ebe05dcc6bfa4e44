"""Gradients of many micro-batches in bf16."""

from __future__ import annotations

import pytest
import torch

from ppo_dist.config.workers import LearnerSection
from ppo_dist.learner.engine import ZeroEngine, join_group

MICRO_BATCHES, SIZE = 100, 16


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_those_of_micro_batches_add_up_in_fp32(stage: int, offload: str) -> None:
    """A bf16 sum takes nothing in that is less than a 256th of it."""
    join_group(0, 1, "127.0.0.1", 0, "cpu", 60)
    section = {"zero_stage": stage, "dtype": "bf16", "offload": offload}
    section["optimizer"] = {"kind": "sgd"}
    module = torch.nn.Linear(SIZE, 1, bias=False, dtype=torch.bfloat16)
    before = module.weight.detach().float()
    engine = ZeroEngine(module, LearnerSection.model_validate(section), 0.0)
    inputs = torch.rand(MICRO_BATCHES, SIZE).bfloat16()
    for micro_batch in inputs:
        engine.backward(engine(micro_batch[None]).float().sum())
    engine.step(1.0)
    [master] = engine._masters
    change = before.flatten() - master.detach().flatten()[:SIZE]
    assert torch.allclose(change, inputs.float().sum(0), rtol=1e-5)
