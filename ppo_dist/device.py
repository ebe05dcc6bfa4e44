"""All that depends on CUDA being there or not."""

from __future__ import annotations

import datetime
import os
from typing import Any, Literal

import torch
import torch.distributed

DeviceKind = Literal["cpu", "cuda"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def available() -> DeviceKind:
    """The kind of device that this process sees."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(kind: DeviceKind, threads: int) -> torch.device:
    """The device of this worker, with its thread count set. Call it before any other work in the
    process.

    On a GPU every worker sees its own device alone (CUDA_VISIBLE_DEVICES), so it is number 0.
    """
    torch.set_num_threads(threads)
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def backend(kind: DeviceKind) -> str:
    """The collective backend of torch.distributed."""
    return "nccl" if kind == "cuda" else "gloo"


def of_collectives(kind: DeviceKind) -> torch.device:
    """Where tensors must be for `backend`."""
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def process_group(kind: DeviceKind, store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """A process group beside the default one; all its members call this.

    Raises:
        RuntimeError: not all of them did in time.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if kind == "cuda":
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return torch.distributed.ProcessGroupNCCL(store, rank, size, options)
    return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)


def before_vllm(kind: DeviceKind, threads: int, kv_cache_gb: float) -> None:
    """Settings of this process that vLLM reads when it is first used."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if kind == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = f"{kv_cache_gb:g}"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)


def vllm_memory(kind: DeviceKind, share: float) -> dict[str, Any]:
    """How vLLM is told what memory it may take; on a CPU the KV cache has a fixed size."""
    return {"gpu_memory_utilization": share} if kind == "cuda" else {}


def attention_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The number format in which attention runs fastest.

    torch's CPU kernel takes 2 to 4 times as long backward in bf16 as in fp32 (torch 2.13, 48
    sequences of 51 tokens).
    """
    if tensor.device.type == "cpu":
        return torch.promote_types(tensor.dtype, torch.float32)
    return tensor.dtype


def tell_deepspeed() -> None:
    """Names the accelerator before DeepSpeed is imported: without one it would guess, and warn."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
