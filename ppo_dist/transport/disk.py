"""Weights through a folder that learners and rollout workers share: safetensors files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save

from ppo_dist.files import aside
from ppo_dist.protocols import NamedTensors, WeightsError
from ppo_dist.transport.wire import buckets, digest, of_all
from ppo_dist.types import Weights

POLL_S = 0.05


class DiskSender:
    """Writes a folder a version, whole or not at all, and removes those that nobody asks for any
    more. Weights.parts are its path and the files' digests.
    """

    def __init__(self, folder: Path, bucket_bytes: int, keep: int) -> None:
        """What an earlier process left in the folder is removed: its versions may be later ones."""
        self._folder, self._bucket_bytes, self._keep = folder, bucket_bytes, keep
        shutil.rmtree(folder, ignore_errors=True)

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """See WeightSender."""
        folder = self._folder / f"version-{version:08d}"
        digests: list[str] = []
        with aside(folder) as made:
            for bucket in buckets(weights, self._bucket_bytes):
                content = save(dict(bucket.tensors()))
                (made / _name(len(digests))).write_bytes(content)
                digests.append(digest(content))
        for old in sorted(self._folder.glob("version-*"))[: -self._keep]:
            shutil.rmtree(old)
        return Weights(version, (str(folder), *digests), of_all(digests))


class DiskReceiver:
    """Reads them from there."""

    def receive(self, weights: Weights, deadline_s: float) -> None:
        """See WeightReceiver. A network file system may show the folder a while later."""
        folder, end = Path(weights.parts[0]), time.monotonic() + deadline_s
        while not folder.exists():
            if time.monotonic() > end:
                raise WeightsError(f"{folder} is not to be seen here after {deadline_s:g} s")
            time.sleep(POLL_S)
        for _ in _contents(weights):
            pass

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightReceiver."""
        for content in _contents(weights):
            yield from load(content).items()


def _contents(weights: Weights) -> Iterator[bytes]:
    folder, *digests = weights.parts
    for number, expected in enumerate(digests):
        path = Path(folder) / _name(number)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise WeightsError(f"{path}: {error}") from None
        if digest(content) != expected:
            raise WeightsError(f"{path}: its bytes were changed")
        yield content


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"
