"""Weights within one process."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ppo_dist.protocols import NamedTensors
from ppo_dist.transport.wire import packed, unpack
from ppo_dist.types import Weights


class MemorySender:
    """Weights.parts are copies of the tensors."""

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """See WeightSender."""
        return Weights(version, tuple(packed(name, tensor) for name, tensor in weights))


class MemoryReceiver:
    """Takes them from there."""

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightReceiver."""
        yield from map(unpack, weights.parts)
