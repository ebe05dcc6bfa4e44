"""All that depends on CUDA being there or not."""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from ppo_dist import heap

DeviceKind = Literal["cpu", "cuda"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_RATES: dict[tuple[str, torch.dtype], float] = {}


def available() -> DeviceKind:
    """The kind of device that this process sees."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(kind: DeviceKind, threads: int) -> torch.device:
    """The device of this worker, with its thread count set. What it frees there it keeps.

    On a GPU every worker sees its own device alone (CUDA_VISIBLE_DEVICES), so it is number 0.
    """
    torch.set_num_threads(threads)
    if kind == "cpu":
        heap.keep()
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def gpus() -> int:
    """How many GPUs this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def visible() -> str:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES; empty if that is not set."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def seeing(gpus: str) -> dict[str, str]:
    """The environment of a process that sees these GPUs though Ray gave it none."""
    return {"CUDA_VISIBLE_DEVICES": gpus, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def matrix_rate(where: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of a few, measured once in a process."""
    key = (where.type, dtype)
    if key not in _RATES:
        size = 8192 if where.type == "cuda" else 1024
        own = torch.Generator(where).manual_seed(0)  # what a run draws is not for this
        a, b = (torch.randn(size, size, device=where, dtype=dtype, generator=own) for _ in range(2))
        taken = []
        for _ in range(4):
            begin = time.perf_counter()
            (a @ b)[0, 0].item()  # it is done
            taken.append(time.perf_counter() - begin)
        _RATES[key] = 2 * size**3 / min(taken)
    return _RATES[key]


def peak_memory() -> int | None:
    """Bytes of a GPU that this process has had at most, since this was last asked; None without."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def pins_memory() -> bool:
    """Whether memory of the CPU that is exchanged with the device is pinned."""
    return available() == "cuda"


def free_cache(device: torch.device) -> None:
    """Gives memory that is kept for later back to the device."""
    if device.type == "cpu":
        return heap.give_back()
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
    torch.cuda.empty_cache()


def empty_bytes(count: int, where: torch.device) -> torch.Tensor:
    """Bytes that will all be filled. On a CPU numpy takes them, in huge pages where Linux has some:
    to touch fresh small ones takes longer than to copy into them what comes (1.1 against 5 GB/s).
    """
    if where.type == "cpu":
        return torch.from_numpy(np.empty(count, np.uint8))
    return torch.empty(count, dtype=torch.uint8, device=where)


def on_every_gpu(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies in the memory of all GPUs that this process sees, by the GPU's UUID."""
    found = {}
    for index in range(gpus()):
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        found[uuid] = flat.to(torch.device("cuda", index))
        torch.cuda.synchronize(index)  # who imports it reads at once
    return found


def exported(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A handle of a tensor in a GPU's memory for another process of the same node. The tensor must
    stay until that is done with it.
    """
    args: tuple[Any, ...] = reduce_tensor(tensor)[1]  # type: ignore[no-untyped-call]
    return args


def imported(handles: dict[str, tuple[Any, ...]], device: torch.device) -> torch.Tensor:
    """The tensor behind the handle of the GPU `device`, among handles by UUID."""
    args = list(handles[str(torch.cuda.get_device_properties(device).uuid)])
    args[6] = device.index  # the number that this process knows it by
    tensor: torch.Tensor = rebuild_cuda_tensor(*args)  # type: ignore[no-untyped-call]
    return tensor


def backend(kind: DeviceKind) -> str:
    """The collective backend of torch.distributed."""
    return "nccl" if kind == "cuda" else "gloo"


def network_settings(kind: DeviceKind) -> str:
    """The variables that tell `backend` which network to take, and to say more."""
    return "NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO" if kind == "cuda" else "GLOO_SOCKET_IFNAME"


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
        # read as the group is made: its wait() blocks, and raises when a member is dead or late;
        # without it NCCL's watchdog would end this process
        with environment(TORCH_NCCL_BLOCKING_WAIT="1"):
            return torch.distributed.ProcessGroupNCCL(store, rank, size, options)
    return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Within it variables of this process have these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def described() -> str:
    """What this process may compute on, in words."""
    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores"
    found = [torch.cuda.get_device_properties(n) for n in range(gpus())]
    return ", ".join(f"{each.name} ({each.total_memory / 1e9:.0f} GB)" for each in found)


def round_trip(
    kind: DeviceKind,
    rank: int,
    size: int,
    address: str,
    port: int,
    nbytes: int,
    timeout_s: float,
) -> float:
    """Seconds of one collective sum of that many bytes, the median of several; all ranks call this,
    and rank 0 is at `address`.

    Raises:
        RuntimeError: not all of them did in time.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(address, port, size, rank == 0, timeout)
    group = process_group(kind, store, rank, size, timeout_s)
    tensor, taken = torch.ones(nbytes // 4, device=of_collectives(kind)), []
    for _ in range(5):
        begin = time.perf_counter()
        group.allreduce([tensor]).wait()
        tensor.sum().item()  # it is there
        taken.append(time.perf_counter() - begin)
    store.set(f"done {rank}", "")
    if rank == 0:  # the store ends with this process
        store.wait([f"done {other}" for other in range(size)], timeout)
    return statistics.median(taken)


def before_compiling(kind: DeviceKind) -> None:
    """Settings of this process that torch's compiler reads when it is first used: for a CPU it
    works in this process, and starts others for nothing.
    """
    if kind == "cpu":
        os.environ.setdefault("TORCH_WARM_POOL", "0")


def compiler(kind: DeviceKind) -> str:
    """What torch.compile needs, in words."""
    return "Triton" if kind == "cuda" else "a C++ compiler and Python's headers"


def before_vllm(kind: DeviceKind, threads: int, kv_cache_gb: int) -> None:
    """Settings of this process that vLLM reads when it is first used."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if kind == "cuda":  # handles of GPU memory go to its processes as pickles
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if kind == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gb)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)


def vllm_settings(kind: DeviceKind, share: float, sleeps: bool) -> dict[str, Any]:
    """How vLLM is told what memory it may take, and whether it must be able to give it back; on a
    CPU the KV cache has a fixed size, and it cannot.
    """
    if kind == "cpu":
        # after a part of a prompt it takes back a draw of the sequence's own random numbers, which
        # a CPU's generator cannot ("CPU Generator does not use offset", vLLM 0.32)
        return {"enable_chunked_prefill": False}
    return {"gpu_memory_utilization": share, "enable_sleep_mode": sleeps}


@contextlib.contextmanager
def traced(file: Path) -> Iterator[None]:
    """Writes a torch trace of what is done inside."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))


def tell_deepspeed() -> None:
    """Names the accelerator before DeepSpeed is imported: without one it would guess, and warn."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
