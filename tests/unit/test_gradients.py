"""Gradients of many micro-batches in bf16."""

from __future__ import annotations

import pytest
import torch

from ppo_dist.config.workers import LearnerSection
from ppo_dist.learner.engine import make_engine
from ppo_dist.learner.process_group import join_group

MICRO_BATCHES, SIZE = 100, 16


@pytest.mark.parametrize(
    ("stage", "offload", "error"),
    [
        *((stage, "none", 1e-5) for stage in range(4)),
        (3, "cpu", 1e-5),
        *((stage, "cpu", 0.05) for stage in (1, 2)),  # DeepSpeed's sum in bf16
    ],
)
def test_they_add_up_in_fp32(stage: int, offload: str, error: float) -> None:
    """A bf16 sum takes nothing in that is less than a 256th of it. Each update has its own alone,
    also after one that was left out.
    """
    join_group(0, 1, "127.0.0.1", 0, "cpu", 60)
    section = {"zero_stage": stage, "dtype": "bf16", "offload": offload}
    section["optimizer"] = {"kind": "sgd"}
    module = torch.nn.Linear(SIZE, 1, bias=False, dtype=torch.bfloat16)
    learner = LearnerSection.model_validate(section)
    engine = make_engine(module, learner, 0.0, torch.device("cpu"))

    def change(inputs: torch.Tensor) -> torch.Tensor:
        [master] = engine._masters.values() if stage == 0 else engine._masters
        before = master.detach().flatten()[:SIZE].clone()
        for micro_batch in inputs:
            engine.backward(engine(micro_batch[None]).float().sum())
        engine.step(1.0)
        return before - master.detach().flatten()[:SIZE]

    for update in range(4):
        inputs = torch.rand(MICRO_BATCHES, SIZE).bfloat16()
        if update == 1:
            inputs[7, 3] = torch.nan
            assert torch.equal(change(inputs), torch.zeros(SIZE))
        else:
            assert torch.allclose(change(inputs), inputs.float().sum(0), rtol=error)
