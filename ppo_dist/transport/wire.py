"""Weights as flat buckets of bytes with a digest: what every medium carries, bfloat16 included."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ppo_dist.device import empty_bytes
from ppo_dist.protocols import NamedTensors, WeightsError

ALIGNMENT = 16  # bytes; no number format needs more


@dataclass(frozen=True)
class Part:
    """A tensor's place in a bucket; `begin` in bytes.

    Example: Part(name="lm_head.weight", dtype="bfloat16", shape=(49152, 576), begin=0)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view of a bucket's bytes."""
        dtype = getattr(torch, self.dtype)
        count = int(np.prod(self.shape, dtype=np.int64))
        raw = flat[self.begin : self.begin + count * dtype.itemsize]
        tensor: torch.Tensor = raw.view(dtype).view(self.shape)
        return tensor


@dataclass(frozen=True, eq=False)
class Bucket:
    """Tensors one behind the other as bytes on the CPU.

    Example: Bucket(parts=(Part(…), …), raw=array([…], dtype=uint8), digest="9f2c…")
    """

    parts: tuple[Part, ...]
    raw: NDArray[np.uint8]
    digest: str

    def check(self) -> None:
        """Raises WeightsError if the bytes are not those that were sent."""
        if digest(self.raw) != self.digest:
            raise WeightsError(f"the bytes of {self.parts[0].name} and what follows were changed")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, as views of the bytes: to be read alone."""
        with warnings.catch_warnings():  # the bytes may be read-only shared memory
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.raw)
        for part in self.parts:
            yield part.name, part.view(flat)


def finite(version: int, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights; raises WeightsError at the first tensor that is not finite. A digest tells
    that they came as they were sent, and not that they were sound.
    """
    for name, tensor in weights:
        # the sum is quick, and may overflow where all is well
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise WeightsError(f"version {version}: {name} is not finite")
        yield name, tensor


def digest(raw: NDArray[np.uint8] | bytes) -> str:
    """Sixteen hexadecimal digits that change with any byte (XXH3, 64 bits)."""
    return xxhash.xxh3_64_hexdigest(memoryview(raw))  # type: ignore[arg-type]


def of_all(digests: Iterable[str]) -> str:
    """The digest of a version, from those of its buckets in order."""
    return xxhash.xxh3_64_hexdigest(" ".join(digests).encode())


def flattened(weights: NamedTensors, limit: int) -> Iterator[tuple[tuple[Part, ...], torch.Tensor]]:
    """Tensors in order, copied one behind the other into flat byte tensors of at most about `limit`
    bytes, on their own device.
    """
    parts: list[Part] = []
    flat, size = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in weights:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        begin = -(-size // ALIGNMENT) * ALIGNMENT
        if begin + len(raw) > len(flat):
            if parts:
                yield tuple(parts), flat[:size]
            parts, begin, size = [], 0, 0
            flat = empty_bytes(max(limit, len(raw)), raw.device)
        flat[size:begin] = 0
        size = begin + len(raw)
        flat[begin:size] = raw
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts.append(Part(name, dtype, tuple(tensor.shape), begin))
    if parts:
        yield tuple(parts), flat[:size]


def buckets(weights: NamedTensors, limit: int) -> Iterator[Bucket]:
    """The same on the CPU, with digests."""
    for parts, flat in flattened(weights, limit):
        raw = flat.cpu().numpy()
        yield Bucket(parts, raw, digest(raw))
