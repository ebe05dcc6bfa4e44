"""Weights as plain arrays: what every medium can carry, bfloat16 included."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ppo_dist.protocols import NamedTensors


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor as bytes.

    Example: Packed(name="lm_head.weight", dtype="bfloat16", shape=(49152, 576), raw=array([…],
    dtype=uint8))
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


def packed(name: str, tensor: torch.Tensor) -> Packed:
    """A copy of a tensor as bytes on the CPU."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
    return Packed(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numpy())


def unpack(part: Packed) -> tuple[str, torch.Tensor]:
    """The tensor, as a view of the bytes."""
    with warnings.catch_warnings():  # the bytes may be read-only shared memory, and are only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(part.raw)
    return part.name, flat.view(getattr(torch, part.dtype)).view(part.shape)


def buckets(weights: NamedTensors, limit: int) -> Iterator[list[Packed]]:
    """Tensors in order, in lists of at most about `limit` bytes."""
    bucket: list[Packed] = []
    size = 0
    for name, tensor in weights:
        part = packed(name, tensor)
        if bucket and size + part.raw.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(part)
        size += part.raw.nbytes
    if bucket:
        yield bucket
