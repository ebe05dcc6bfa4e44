"""The seams of the system: what a user can replace. Each has at most five methods and lives apart
from its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ppo_dist.reports import Coefficients, StepReport, Vitals
from ppo_dist.types import (
    Annotation,
    Chunk,
    Dropped,
    LabelledExample,
    MixPlan,
    Rollout,
    Score,
    Scored,
    TrainSequence,
    Weights,
)

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightsError(RuntimeError):
    """A version did not arrive, not in time, or not as it was sent."""


class RolloutEngine(Protocol):
    """Writes responses with a copy of the policy."""

    def generate(self, chunk: Chunk) -> list[Rollout]:
        """The responses of a chunk, in the order of its requests and of their indices."""

    def load(self, version: int, weights: NamedTensors) -> None:
        """Replaces every weight of the policy; what is generated from now on carries `version`."""

    def sleep(self) -> None:
        """Frees as much of the device's memory as it can, for whoever else computes there."""

    def wake(self) -> None:
        """Takes it back: afterwards all is as it was before `sleep`."""

    def peak_memory(self) -> int | None:
        """Bytes of a GPU that it has had at most, since this was last asked; None without one."""

    def traced(self, file: Path) -> AbstractContextManager[None]:
        """Writes a torch trace of what is generated inside."""


class RewardSource(Protocol):
    """Judges responses."""

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[Score | Dropped]:
        """One score per rollout, in order, or why there is none."""


class Rewards(RewardSource, Protocol):
    """All that judges in a run."""

    def vitals(self) -> Mapping[int, Vitals]:
        """Of each reward model's worker, all models' numbered through: what it told with its
        scores since this was last asked.
        """


class MixSchedule(Protocol):
    """Decides, step by step, how much labelled and how much reinforcement learning there is."""

    def plan(self, step: int) -> MixPlan:
        """What step number `step`, counted from 0, is made of."""

    def observe(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Sees the metrics row of a finished step; −1 is the evaluation before the first."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later plans depend on, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""


class Gate(Protocol):
    """Decides which unlabelled prompts of a step count."""

    def admit(self, scored: Sequence[Scored]) -> set[str]:
        """Uids of the unlabelled prompts that count; sees every response of the step, once."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""


class AdvantageEstimator(Protocol):
    """Turns per-token rewards and values into advantages and returns."""

    def __call__(
        self,
        rewards_BR: torch.Tensor,
        values_BR: torch.Tensor,
        mask_BR: torch.Tensor,
        value_end_B: torch.Tensor,
        group_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(advantages_BR, returns_BR), zero where the mask is 0. Rows with the same `group_B` are
        responses to the same prompt; a step comes in parts, each of whole groups.
        """


class Tracker(Protocol):
    """Where metrics and samples go."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes one row."""

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to the table of prompts, responses and rewards."""

    def alert(self, step: int, title: str, text: str) -> None:
        """Tells of something that a person should look at."""

    def close(self) -> None:
        """Flushes and ends."""


class WeightSender(Protocol):
    """The learner's end of the way that weights travel."""

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """Sends all weights; returns what receivers need to fetch them."""


class WeightReceiver(Protocol):
    """A rollout worker's end of the way that weights travel."""

    def receive(self, weights: Weights, deadline_s: float) -> None:
        """Waits until a version is here, or can be had from here at once; may run beside `fetch`.

        Raises:
            WeightsError: it does not come in time.
        """

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of a version that was received, name by name, checked bucket by bucket.

        Raises:
            WeightsError: it is not here, or not as it was sent.
        """


class LearnerGroup(Protocol):
    """All learner workers, as one. Whatever it is asked, it may say that they are lost
    (WorkersLost).
    """

    def annotate(
        self, responses: Sequence[Rollout | LabelledExample], imitation: bool = False
    ) -> list[Annotation]:
        """What policy, reference and critic say of each response; the policy is not asked where
        the rollout workers' log-probabilities serve as the old ones (`algorithm.old_logprobs`).

        The first call fixes the reference (the policy as it is then, where it is to be reset) and
        starts the critic. With `imitation` the policy alone is asked, at temperature 1 as the
        supervised loss sees it; the other columns are 0.
        """

    def update(
        self, updates: Sequence[Sequence[TrainSequence]], coefficients: Coefficients
    ) -> StepReport:
        """One optimizer step for each list of sequences."""

    def publish(self, version: int) -> Weights:
        """Sends the policy's weights out under a version number."""

    def save(self, checkpoint: Path | None = None, policy: Path | None = None) -> None:
        """Writes a checkpoint (all that training depends on), or the policy as a Hugging Face
        folder.
        """


class RolloutPool(Protocol):
    """All rollout workers, as one."""

    def load(self, weights: Weights) -> bool:
        """Makes a version available to all workers; what they have to do goes on. Returns whether
        any of them has it.
        """

    def submit(self, chunks: Sequence[Chunk]) -> int:
        """Queues chunks behind those that wait; each is generated by exactly the version that it
        names. Versions never fall. Returns a ticket.
        """

    def collect(self, ticket: int) -> list[Rollout]:
        """Waits for what was submitted under a ticket, once; rollouts in its chunks' order. Raises
        RunError if no worker can do it, WorkersLost if none has the version or can be given it.
        """

    def vitals(self) -> Mapping[int, Vitals]:
        """Of each worker that is left, by number: what it told with what was collected since this
        was last asked.
        """

    def resize(self, workers: int) -> None:
        """Has so many workers from now on, where that can be changed: more begin beside what goes
        on, those too many end once they are idle. The numbers of a run do not depend on it. Whoever
        is left out stays out until another number is asked for.
        """
