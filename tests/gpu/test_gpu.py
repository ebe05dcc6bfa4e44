"""What only a CUDA device can show; each test skips with its reason elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ppo_dist.config import Config
from ppo_dist.config.workers import LearnerSection
from ppo_dist.learner.engine import make_engine
from ppo_dist.learner.process_group import join_group
from ppo_dist.models.attention import causal_attention
from ppo_dist.run import train
from ppo_dist.tracking.local import read_rows
from tests.conftest import raw_config
from tests.unit.test_attention import by_torch, tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 1), ("bf16", 0), ("bf16", 1), ("bf16", 3)])
def test_a_run_on_one_gpu(tmp_path: Path, dtype: str, stage: int) -> None:
    """Learner and rollout worker in one process on one device; their log-probabilities agree."""
    raw = raw_config(tmp_path / "run", learner={"dtype": dtype, "zero_stage": stage})
    rows = _rows(raw)
    limit = 1e-3 if dtype == "fp32" else 0.2
    assert all(row["rollout/logprob_gap"] < limit for row in rows[1:])


@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("shape", [(2, 6, 2, 60, 64, 64), (2, 6, 6, 60, 64, 64)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_attention_of_all_tokens_and_of_the_last(
    dtype: torch.dtype, rounding: float, shape: tuple[int, ...], first: int
) -> None:
    """As in fp64 on the CPU, with gradients; of bf16 by a kernel that knows no mask."""
    exact = tables(shape)
    rough = [table.detach().to("cuda", dtype).requires_grad_() for table in exact]
    out = causal_attention(rough[0][:, :, first:], *rough[1:], None, {})
    expected = by_torch(exact)
    towards = torch.randn_like(expected[:, :, first:])
    out.backward(towards.to("cuda", dtype))
    expected[:, :, first:].backward(towards)
    pairs = [(out, expected[:, :, first:])]
    pairs += [(a.grad, b.grad) for a, b in zip(rough, exact, strict=True)]
    for found, known in pairs:
        assert float((found.cpu().double() - known).norm() / known.norm()) < rounding


def test_a_bucket_is_handed_to_another_process(tmp_path: Path) -> None:
    """Through a GPU's own memory: what arrives has the digest of what was sent."""
    from ppo_dist.rollout.handover import through_gpus

    weights = [("a", torch.randn(300, 7, dtype=torch.bfloat16)), ("b", torch.randn(5))]
    context = torch.multiprocessing.get_context("spawn")
    for told, digest in through_gpus([(n, t.cuda()) for n, t in weights], 2**10):
        answers = context.SimpleQueue()
        process = context.Process(target=_digest_of, args=(told["ipc_handles"], answers))
        process.start()
        assert answers.get() == digest
        process.join()


def _digest_of(handles: list[dict[str, tuple[Any, ...]]], answers: Any) -> None:
    from ppo_dist.device import imported
    from ppo_dist.rollout.handover import digest_of

    here = torch.device("cuda", 0)
    answers.put(digest_of([imported(each, here) for each in handles]))


@pytest.mark.parametrize("stage", [2, 3])
def test_learner_and_rollout_worker_take_turns_on_one_gpu(tmp_path: Path, stage: int) -> None:
    """The same numbers as in one process, with a checkpoint after each evaluation."""
    sections = {
        "learner": {"zero_stage": stage},
        "eval": {"every": 1},
        "train": {"steps": 3, "checkpoint_every": 1},
    }
    alone = raw_config(tmp_path / "alone", cluster={"kind": "local"}, **sections)
    turns = raw_config(
        tmp_path / "turns", cluster={"kind": "ray", "placement": "colocated"}, **sections
    )
    rows = [_rows(raw) for raw in (alone, turns)]
    for one, other in zip(*rows, strict=True):
        for key in ("reward/verifiable/mean", "policy/loss", "eval/held_out/accuracy"):
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_learner_that_sleeps_frees_memory(tmp_path: Path, stage: int) -> None:
    """Master weights and Adam's two moments: 12 bytes a parameter in bf16."""
    module = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)
    join_group(0, 1, "127.0.0.1", 0, "cuda", 60)
    learner = LearnerSection(zero_stage=stage, dtype="bf16")
    engine = make_engine(module, learner, 0.0, torch.device("cuda"))
    row = torch.ones(1, 1000, dtype=torch.bfloat16, device="cuda")
    engine.backward(engine(row).float().sum())
    engine.step(1e-3)
    before = torch.cuda.memory_allocated()
    engine.sleep()
    engine.sleep()  # the second changes nothing
    assert before - torch.cuda.memory_allocated() > 11.9e6
    engine.backward(engine(row).float().sum())
    engine.step(1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transport", ["collective", "store"])
def test_a_learner_and_a_rollout_worker_on_two_gpus(tmp_path: Path, transport: str) -> None:
    raw = raw_config(
        tmp_path / "run",
        cluster={"kind": "ray"},
        transport={"kind": transport},
        learner={"dtype": "bf16", "zero_stage": 2},
    )
    assert all(row["rollout/logprob_gap"] < 0.2 for row in _rows(raw)[1:])


@pytest.mark.slow
def test_vllm_proves_that_it_loads(tmp_path: Path) -> None:
    """Colocated on one GPU with the learners: through CUDA IPC, and asleep in turn."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm)")
    from tests.vllm.test_vllm import MODEL, smollm

    if not MODEL.exists():
        pytest.skip(f"first: ppo-dist fetch smollm2-135m models/{MODEL.name}")
    raw = smollm(
        tmp_path / "run",
        learner={"workers": 1, "dtype": "bf16", "zero_stage": 2},
        cluster={"placement": "colocated"},
        rollout={"engine": {"kind": "vllm", "max_model_tokens": 256, "memory_share": 0.3}},
    )
    rows = _rows(raw)[1:]
    assert all(row["rollout/logprob_gap"] < 0.2 for row in rows)
    assert all(row["system/rollout-0/gpu_memory_gb"] > 1 for row in rows), "of vLLM's process"


def _rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    assert train(Config.model_validate(raw), resume=False, console=Console(quiet=True)) == 0
    return read_rows(Path(raw["run"]["dir"]) / "metrics.jsonl")
