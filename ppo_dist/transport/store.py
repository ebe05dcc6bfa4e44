"""Weights through the Ray object store: written once, mapped by every receiver on a node without a
copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import ray
import torch
from ray.exceptions import RayError

from ppo_dist.protocols import NamedTensors, WeightsError
from ppo_dist.transport.wire import Bucket, buckets, of_all
from ppo_dist.types import Weights


class StoreSender:
    """Puts buckets into the object store; Weights.parts are their references."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """See WeightSender."""
        references, digests = [], []
        for bucket in buckets(weights, self._bucket_bytes):
            references.append(ray.put(bucket))
            digests.append(bucket.digest)
        return Weights(version, tuple(references), of_all(digests))


class StoreReceiver:
    """Takes buckets out of the object store one after the other."""

    def receive(self, weights: Weights, deadline_s: float) -> None:
        """See WeightReceiver. Brings them to this node, where reading takes no copy."""
        parts = list(weights.parts)
        ready, late = ray.wait(parts, num_returns=len(parts), timeout=deadline_s)
        if late:
            raise WeightsError(
                f"version {weights.version}: {len(ready)} of {len(parts)} buckets came in "
                f"{deadline_s:g} s"
            )
        for part in parts:
            _bucket(weights.version, part).check()

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightReceiver. The tensors are views of shared memory: to be read alone."""
        for part in weights.parts:
            yield from _bucket(weights.version, part).tensors()


def _bucket(version: int, part: ray.ObjectRef) -> Bucket:
    try:
        bucket: Bucket = ray.get(part)
    except RayError as error:
        raise WeightsError(f"version {version}: {error}") from None
    return bucket
