"""What only a CUDA device can show; each test skips with its reason elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from ppo_dist.config import Config
from ppo_dist.run import train
from tests.conftest import raw_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 1), ("bf16", 1), ("bf16", 3)])
def test_a_run_on_one_gpu(tmp_path: Path, dtype: str, stage: int) -> None:
    """Learner and rollout worker in one process on one device; their log-probabilities agree."""
    raw = raw_config(tmp_path / "run", learner={"dtype": dtype, "zero_stage": stage})
    config = Config.model_validate(raw)
    assert train(config, resume=False, console=Console(quiet=True)) == 0
    from ppo_dist.tracking.local import read_rows

    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    limit = 1e-3 if dtype == "fp32" else 0.2
    assert all(row["rollout/logprob_gap"] < limit for row in rows[1:])
