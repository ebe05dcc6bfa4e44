"""Weights within one process."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ppo_dist.protocols import NamedTensors
from ppo_dist.transport.wire import buckets, of_all
from ppo_dist.types import Weights


class MemorySender:
    """Weights.parts are copies of the tensors."""

    def __init__(self, bucket_bytes: int = 2**20) -> None:
        self._bucket_bytes = bucket_bytes

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """See WeightSender."""
        parts = tuple(buckets(weights, self._bucket_bytes))
        return Weights(version, parts, of_all(part.digest for part in parts))


class MemoryReceiver:
    """Takes them from there."""

    def receive(self, weights: Weights, deadline_s: float) -> None:
        """See WeightReceiver. There is nothing to wait for."""

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightReceiver."""
        for part in weights.parts:
            yield from part.tensors()
