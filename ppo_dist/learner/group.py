"""All learner workers as one: cuts work into balanced shards, calls every rank, puts the answers
together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ppo_dist.config import RunError
from ppo_dist.data.batching import count_tokens, shares
from ppo_dist.learner.roles import LAST_FILE
from ppo_dist.learner.worker import Asked, LearnerWorker, UpdateShard
from ppo_dist.reports import Coefficients, StepReport, TermSums, UpdateReport
from ppo_dist.tracking.metrics import mean
from ppo_dist.types import (
    Annotation,
    LabelledExample,
    Rollout,
    TrainSequence,
    Weights,
)

R = TypeVar("R")
SEEN_WITHIN_S = 60.0  # what another machine wrote to a network disk
ANNOTATED = 4  # micro-batches' tokens in a pass that keeps nothing for a backward one


class Ranks(Protocol):
    """The workers of a group, wherever they run."""

    world: int

    def call(self, method: Callable[..., R], args: Sequence[tuple[Any, ...]]) -> list[R]:
        """`method(worker, *args[rank])` on every rank at the same time; results by rank.

        `method` is one of LearnerWorker, given as LearnerWorker.update, so that it can be found.
        """


class InProcess:
    """One worker in this process, whose calls `run` makes."""

    world = 1

    def __init__(self, worker: LearnerWorker, run: Callable[..., Any]) -> None:
        self._worker, self._run = worker, run

    def call(self, method: Callable[..., R], args: Sequence[tuple[Any, ...]]) -> list[R]:
        """See Ranks."""
        return [self._run(method, self._worker, *args[0])]


class Learners:
    """The LearnerGroup of the system; see protocols.py."""

    def __init__(self, ranks: Ranks, micro_batch_tokens: int, shares_trunk: bool = False) -> None:
        self._ranks = ranks
        self._budget = micro_batch_tokens
        self._shares_trunk = shares_trunk

    def annotate(
        self, responses: Sequence[Rollout | LabelledExample], imitation: bool = False
    ) -> list[Annotation]:
        """See LearnerGroup."""
        rows = [_asked(response) for response in responses]
        asked = [row[:2] for row in rows]
        parts = shares(asked, self._ranks.world, self._budget, ANNOTATED)
        work = [([[rows[i] for i in members] for members in part], imitation) for part in parts]
        answers = self._ranks.call(LearnerWorker.annotate, work)
        by_index: dict[int, Annotation] = {}
        for part, answer in zip(parts, answers, strict=True):
            for members, found in zip(part, answer, strict=True):
                by_index.update(zip(members, found, strict=True))
        return [by_index[i] for i in range(len(rows))]

    def update(
        self, updates: Sequence[Sequence[TrainSequence]], coefficients: Coefficients
    ) -> StepReport:
        """See LearnerGroup."""
        by_rank: list[list[UpdateShard]] = [[] for _ in range(self._ranks.world)]
        for sequences in updates:
            for rank, shard in enumerate(self._shards(sequences, coefficients)):
                by_rank[rank].append(shard)
        reports = self._ranks.call(
            LearnerWorker.update, [(shards, coefficients) for shards in by_rank]
        )
        merged = tuple(map(_merged, zip(*(report.updates for report in reports), strict=True)))
        vitals = tuple(v for report in reports for v in report.vitals)
        return StepReport(merged, vitals, mean([r.mfu for r in reports if r.mfu is not None]))

    def publish(self, version: int) -> Weights:
        """See LearnerGroup."""
        weights = self._ranks.call(LearnerWorker.publish, [(version,)] * self._ranks.world)[0]
        assert weights is not None, "rank 0 sends"
        return weights

    def save(self, checkpoint: Path | None = None, policy: Path | None = None) -> None:
        """See LearnerGroup."""
        if checkpoint is not None:
            self._ranks.call(LearnerWorker.save_checkpoint, [(checkpoint,)] * self._ranks.world)
            _await_all(checkpoint, self._ranks.world)
        if policy is not None:
            self._ranks.call(LearnerWorker.save_policy, [(policy,)] * self._ranks.world)

    def _shards(
        self, sequences: Sequence[TrainSequence], coefficients: Coefficients
    ) -> list[UpdateShard]:
        counts = count_tokens(sequences)
        taught = _busy(sequences, coefficients)
        valued = [s for s in sequences if s.value_weight_R.any()]
        if self._shares_trunk:
            named = {id(s) for s in (*taught, *valued)}
            taught, valued = [s for s in sequences if id(s) in named], []
        policy = self._parts(taught)
        critic = policy if valued == taught else self._parts(valued)
        return [UpdateShard(policy[r], critic[r], counts) for r in range(self._ranks.world)]

    def _parts(
        self, sequences: Sequence[TrainSequence]
    ) -> list[tuple[tuple[TrainSequence, ...], ...]]:
        if not sequences:
            return [()] * self._ranks.world
        rows = [(s.tokens_T, s.prompt_tokens) for s in sequences]
        parts = shares(rows, self._ranks.world, self._budget)
        return [tuple(tuple(sequences[i] for i in members) for members in part) for part in parts]


def _busy(sequences: Sequence[TrainSequence], coefficients: Coefficients) -> list[TrainSequence]:
    """Those with a gradient of the policy. A response without advantage, as in a group of equal
    rewards, has none unless KL or entropy are in the loss; if there are only such, one is kept for
    the metrics. Token counts are of all, so the other gradients stay what they are.
    """
    imitated = [s for s in sequences if s.ce_weight_R.any()]
    acting = [s for s in sequences if s.policy_weight_R.any()]
    if not (coefficients.kl or coefficients.entropy):
        moved = [s for s in acting if (s.policy_weight_R * s.advantages_R).any()]
        acting = moved or acting[:1]
    return [*acting, *imitated]


def _asked(response: Rollout | LabelledExample) -> Asked:
    prompt = response.prompt
    told = response.logprobs_R if isinstance(response, Rollout) else np.zeros(0, np.float32)
    tokens_T = np.concatenate([prompt.tokens_P, response.tokens_R])
    return Asked(tokens_T, len(prompt.tokens_P), told)


def _merged(of_ranks: Sequence[UpdateReport]) -> UpdateReport:
    sums = reduce(TermSums.__add__, (report.sums for report in of_ranks))
    first = of_ranks[0]
    return UpdateReport(first.counts, sums, first.grad_norm, first.critic_grad_norm)


def _await_all(checkpoint: Path, world: int) -> None:
    """Until every rank's files are to be seen here.

    Raises:
        RunError: some are not.
    """
    end = time.monotonic() + SEEN_WITHIN_S
    while missing := [r for r in range(world) if not (checkpoint / LAST_FILE.format(r)).exists()]:
        if time.monotonic() > end:
            raise RunError(
                f"{checkpoint}: the files of {len(missing)} of {world} learners are not there: "
                "run.dir must be on storage that all nodes share"
            )
        time.sleep(0.5)
