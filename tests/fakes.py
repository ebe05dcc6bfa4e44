"""Small stand-ins behind the protocols, which hold the same contracts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppo_dist.reports import (
    Coefficients,
    StepReport,
    TermSums,
    TokenCounts,
    UpdateReport,
    Vitals,
)
from ppo_dist.types import (
    Annotation,
    Chunk,
    LabelledExample,
    Rollout,
    Score,
    TrainSequence,
    Weights,
)


class FakeEngine:
    """A RolloutEngine that counts instead of drawing; token 1 ends a response."""

    def __init__(self) -> None:
        self.version = 0
        self.weights: dict[str, torch.Tensor] = {}
        self.is_asleep = False

    def sleep(self) -> None:
        self.is_asleep = True

    def wake(self) -> None:
        self.is_asleep = False

    def peak_memory(self) -> int | None:
        return None

    def traced(self, file: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights}
        self.version = version

    def generate(self, chunk: Chunk) -> list[Rollout]:
        assert not self.is_asleep
        if chunk.version != self.version:
            raise ValueError(f"asked for version {chunk.version}, version {self.version} is loaded")
        return [
            self._rollout(request.prompt, index, chunk)
            for request in chunk.requests
            for index in request.indices
        ]

    def _rollout(self, prompt: Any, index: int, chunk: Chunk) -> Rollout:
        limit = chunk.sampling.max_new_tokens
        length = min(1 + (len(prompt.uid) + index + chunk.step) % 4, limit)
        tokens = np.array([2 + (len(prompt.uid) + index + n) % 8 for n in range(length)], np.int64)
        ended = length < limit
        if ended:
            tokens[-1] = 1
        return Rollout(
            prompt=prompt,
            index=index,
            tokens_R=tokens,
            logprobs_R=np.full(length, -0.5, np.float32),
            text=" ".join(map(str, tokens)),
            finish="eos" if ended else "length",
            version=self.version,
        )


class FakePool:
    """A RolloutPool over one FakeEngine that is done as soon as it is asked; keeps what it was told
    in `events`.
    """

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.events: list[str] = []
        self._done: dict[int, list[Rollout]] = {}
        self._tickets, self._busy = 0, 0

    def submit(self, chunks: Sequence[Chunk]) -> int:
        self.events += [f"submit {len(chunks)} of step {step}" for step in {c.step for c in chunks}]
        self._tickets += 1
        self._done[self._tickets] = [r for chunk in chunks for r in self.engine.generate(chunk)]
        return self._tickets

    def collect(self, ticket: int) -> list[Rollout]:
        self._busy += 1
        return self._done.pop(ticket)

    def vitals(self) -> dict[int, Vitals]:
        busy, self._busy = self._busy, 0
        return {0: Vitals(busy)}

    def resize(self, workers: int) -> None:
        self.events.append(f"resize {workers}")

    def load(self, weights: Weights) -> bool:
        self.events.append(f"load {weights.version}")
        self.engine.load(weights.version, weights.parts)
        return True


class FakeLearners:
    """A LearnerGroup whose one weight counts updates; the value of a state is a tenth of it."""

    def __init__(self) -> None:
        self.updates = 0
        self.poisoned: set[int] = set()  # numbers of updates whose gradient is not finite
        self.events: list[str] = []
        self.seen: list[list[TrainSequence]] = []

    def annotate(
        self, responses: Sequence[Rollout | LabelledExample], imitation: bool = False
    ) -> list[Annotation]:
        self.events.append("annotate" + " to imitate" * imitation)
        return [self._annotation(len(r.tokens_R)) for r in responses]

    def _annotation(self, count: int) -> Annotation:
        level = np.full(count, self.updates / 10, np.float32)
        return Annotation(level - 0.5, np.full(count, -0.5, np.float32), level, self.updates / 10)

    def update(
        self, updates: Sequence[Sequence[TrainSequence]], coefficients: Coefficients
    ) -> StepReport:
        self.events.append(f"update {len(updates)}")
        reports = [self._report(self.updates + n, each) for n, each in enumerate(updates)]
        self.updates += len(updates)
        self.seen += [list(sequences) for sequences in updates]
        return StepReport(tuple(reports))

    def _report(self, number: int, sequences: Sequence[TrainSequence]) -> UpdateReport:
        counts = TokenCounts(
            policy=sum(int(np.count_nonzero(s.policy_weight_R)) for s in sequences),
            value=sum(int(np.count_nonzero(s.value_weight_R)) for s in sequences),
            ce=sum(int(np.count_nonzero(s.ce_weight_R)) for s in sequences),
        )
        sums = TermSums(policy_loss=float(counts.policy), ce_loss=2.0 * counts.ce)
        norm = float("inf") if number in self.poisoned else 1.0
        return UpdateReport(counts, sums, grad_norm=norm, critic_grad_norm=None)

    def publish(self, version: int) -> Weights:
        self.events.append(f"publish {version}")
        return Weights(version, (("count", torch.tensor([float(self.updates)])),))

    def save(self, checkpoint: Path | None = None, policy: Path | None = None) -> None:
        if checkpoint is not None:
            (checkpoint / "count.txt").write_text(str(self.updates))
        if policy is not None:
            self.events.append(f"export {policy.name}")
            policy.mkdir(parents=True, exist_ok=True)

    def restore(self, checkpoint: Path) -> None:
        """What a real group does in its constructor."""
        self.updates = int((checkpoint / "count.txt").read_text())


class FakeReward:
    """Rewards: 1 where the response has an even number of tokens."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(float(len(r.tokens_R) % 2 == 0), "fake") for r in rollouts]

    def vitals(self) -> dict[int, Vitals]:
        return {}


class FakeTracker:
    """A Tracker that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.alerts: list[tuple[int, str, str]] = []
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.rows.append({"step": step, **metrics})

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.samples += [{"step": step, **row} for row in rows]

    def alert(self, step: int, title: str, text: str) -> None:
        self.alerts.append((step, title, text))

    def close(self) -> None:
        self.closed = True
