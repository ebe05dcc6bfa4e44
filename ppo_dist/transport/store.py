"""Weights through the Ray object store: written once, mapped by every receiver on a node without a
copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import ray
import torch

from ppo_dist.protocols import NamedTensors
from ppo_dist.transport.wire import Packed, buckets, unpack
from ppo_dist.types import Weights


class StoreSender:
    """Puts buckets of weights into the object store; Weights.parts are their references."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """See WeightSender."""
        return Weights(
            version, tuple(ray.put(bucket) for bucket in buckets(weights, self._bucket_bytes))
        )


class StoreReceiver:
    """Takes buckets out of the object store one after the other."""

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightReceiver. The tensors are views of shared memory: to be read alone."""
        for part in weights.parts:
            bucket: list[Packed] = ray.get(part)
            yield from map(unpack, bucket)
