"""How weights get from the process of a rollout worker into those of its engine, bucket by bucket:
through a file in memory, or within a GPU's memory (CUDA IPC).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ppo_dist import device
from ppo_dist.device import DeviceKind
from ppo_dist.protocols import NamedTensors
from ppo_dist.transport.wire import buckets, digest, flattened, of_all

Update = tuple[dict[str, Any], str]  # what the engine's end is told, and the digest of the bucket


@dataclass(frozen=True)
class Handover:
    """`backend` is the name of the engine's end; `updates(weights, bucket_bytes)` yields what to
    tell it, each valid until the next is taken.

    Example: Handover(backend="ppo_dist_file", updates=through_files)
    """

    backend: str
    updates: Callable[[NamedTensors, int], Iterator[Update]]


def through_files(weights: NamedTensors, bucket_bytes: int) -> Iterator[Update]:
    """Each bucket as a file that has no name but in this process's folder of /proc: whenever the
    process dies, nothing is left of it.
    """
    for bucket in buckets(weights, bucket_bytes):
        with open(os.memfd_create("ppo_dist"), "wb") as file:
            bucket.raw.tofile(file)
            file.flush()
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            told = {"path": path, "parts": [asdict(p) for p in bucket.parts]}
            yield {**told, "digest": bucket.digest}, bucket.digest


def through_gpus(weights: NamedTensors, bucket_bytes: int) -> Iterator[Update]:
    """Each bucket in the memory of every GPU that this process sees, as vLLM's own `ipc` engine
    wants it: handles of each tensor by the GPU's UUID.
    """
    for parts, flat in flattened(weights, bucket_bytes):
        copies = device.on_every_gpu(flat)
        tensors = {uuid: _views(copy, parts) for uuid, copy in copies.items()}
        told = {
            "names": [part.name for part in parts],
            "dtype_names": [part.dtype for part in parts],
            "shapes": [list(part.shape) for part in parts],
            "ipc_handles": [
                {uuid: device.exported(views[i]) for uuid, views in tensors.items()}
                for i in range(len(parts))
            ],
        }
        yield told, digest_of(_views(flat, parts))
        del copies, tensors


HANDOVERS: dict[DeviceKind, Handover] = {
    "cpu": Handover("ppo_dist_file", through_files),
    "cuda": Handover("ppo_dist_ipc", through_gpus),
}


def digest_of(tensors: list[torch.Tensor]) -> str:
    """Of tensors wherever they are."""
    return of_all(digest(t.reshape(-1).view(torch.uint8).cpu().numpy()) for t in tensors)


def _views(flat: torch.Tensor, parts: tuple[Any, ...]) -> list[torch.Tensor]:
    return [part.view(flat) for part in parts]
