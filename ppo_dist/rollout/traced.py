"""An engine that writes torch traces of some steps."""

from __future__ import annotations

from pathlib import Path

from ppo_dist.protocols import RolloutEngine
from ppo_dist.types import Chunk, Rollout


class Traced:
    """A RolloutEngine around another one: of each training chunk of `steps` steps, after the first
    that it sees, a trace in `folder`.
    """

    def __init__(self, engine: RolloutEngine, folder: Path, steps: int) -> None:
        self._engine, self._folder, self._steps = engine, folder, steps
        self._first: int | None = None
        self.load, self.sleep, self.wake = engine.load, engine.sleep, engine.wake
        self.peak_memory, self.traced = engine.peak_memory, engine.traced

    def generate(self, chunk: Chunk) -> list[Rollout]:
        """See RolloutEngine."""
        if chunk.sampling.stream != "train":
            return self._engine.generate(chunk)
        if self._first is None:
            self._first = chunk.step
        if not 1 <= chunk.step - self._first <= self._steps:
            return self._engine.generate(chunk)
        with self.traced(self._folder / f"rollout-step-{chunk.step}-chunk-{chunk.index}.json"):
            return self._engine.generate(chunk)
