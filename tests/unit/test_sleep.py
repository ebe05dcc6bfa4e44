"""What an engine holds while it sleeps."""

from __future__ import annotations

import pytest
import torch

from ppo_dist.config.workers import LearnerSection
from ppo_dist.learner.engine import Engine, make_engine
from ppo_dist.learner.process_group import join_group


def taught(engine: Engine) -> None:
    engine.backward(engine(torch.ones(1, 10, dtype=torch.bfloat16)).float().sum())
    engine.step(1e-3)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_nobody_else_holds_what_is_moved(stage: int, steps: int) -> None:
    """Else a GPU would keep the memory, and get a second one when the engine wakes."""
    join_group(0, 1, "127.0.0.1", 0, "cpu", 60)
    module = torch.nn.Linear(10, 10, bias=False, dtype=torch.bfloat16)
    learner = LearnerSection(zero_stage=stage, dtype="bf16")
    engine = make_engine(module, learner, 0.0, torch.device("cpu"))
    for _ in range(steps):
        taught(engine)
        engine.sleep()
    engine.sleep()
    large = [tensor for tensor, _ in engine._asleep.tensors if tensor.numel() > 1]
    assert len(large) == (3 if steps or stage == 0 else 1)
    for tensor in large:
        storage = tensor.untyped_storage()
        assert torch._C._storage_Use_Count(storage._cdata) == 2, "the tensor's, and this one"
    taught(engine)
