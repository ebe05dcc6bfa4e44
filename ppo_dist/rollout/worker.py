"""A rollout worker: an engine and the receiver of its weights. A plain class; cluster/ makes it a
Ray actor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ppo_dist.protocols import RolloutEngine, WeightReceiver
from ppo_dist.reports import Vitals
from ppo_dist.transport.wire import finite
from ppo_dist.types import Chunk, Rollout, Weights
from ppo_dist.vitals import Pulse


class RolloutWorker:
    """Generates chunks, each with the version that it names.

    Versions are received while chunks of older ones are generated, and loaded when the first chunk
    asks for them.
    """

    def __init__(
        self, receiver: WeightReceiver, make_engine: Callable[[], RolloutEngine], keep: int
    ) -> None:
        """The model is not loaded yet; see `start`. Of what is received the newest `keep` versions
        stay.
        """
        self._receiver, self._make_engine, self._keep = receiver, make_engine, keep
        self._received: dict[int, Weights] = {}
        self._lock = threading.Lock()  # a version is received while a chunk is generated
        self._loaded: int | None = 0  # the model as it is on disk
        self._is_asleep = False
        self._pulse = Pulse(lambda: self._engine.peak_memory())

    def start(self, anew: bool = False) -> None:
        """Loads the model, for the first time or anew. Versions can be received before."""
        self._engine = self._make_engine()

    def receive(self, weights: Weights, deadline_s: float = 0.0) -> None:
        """Waits for a version and keeps it for the chunks that will ask for it.

        Raises:
            WeightsError: it did not come in time.
        """
        self._receiver.receive(weights, deadline_s)
        with self._lock:
            self._received[weights.version] = weights
            for old in sorted(self._received)[: -self._keep]:
                del self._received[old]

    def generate(self, chunk: Chunk) -> list[Rollout]:
        """See RolloutEngine. What is older than the chunk's version is forgotten."""
        if self._is_asleep:
            self._engine.wake()
            self._is_asleep = False
        if self._loaded != chunk.version:
            self._load(chunk.version)
        return self._engine.generate(chunk)

    def sleep(self) -> None:
        """Frees the device's memory until the next chunk comes."""
        if not self._is_asleep:
            self._engine.sleep()
        self._is_asleep = True

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        """Rollouts of a chunk, and what they took."""
        begin = time.perf_counter()
        rollouts = self.generate(chunk)
        self._pulse.add(time.perf_counter() - begin)
        return rollouts, self._pulse.vitals()

    def end(self) -> None:
        """See Worker: there is nothing to free, since it is no process of its own."""

    def _load(self, version: int) -> None:
        with self._lock:
            weights = self._received.get(version)
            for old in [v for v in self._received if v <= version]:
                del self._received[old]
        if weights is not None:
            self._loaded = None  # until all of it is there
            self._engine.load(version, finite(version, self._receiver.fetch(weights)))
            self._loaded = version
