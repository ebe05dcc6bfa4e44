"""A learner worker: one rank of policy, critic and reference. A plain class; cluster/ makes it a
Ray actor.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ppo_dist import device
from ppo_dist.config import Config, reuses_logprobs
from ppo_dist.data.batching import pack, pack_rows
from ppo_dist.learner.engine import Engine
from ppo_dist.learner.flops import Rate
from ppo_dist.learner.losses import Tensors, policy_loss, value_loss
from ppo_dist.learner.process_group import join_group
from ppo_dist.learner.roles import Roles
from ppo_dist.models.policy import PolicyOutput
from ppo_dist.protocols import NamedTensors, WeightSender
from ppo_dist.reports import Coefficients, StepReport, TermSums, TokenCounts, UpdateReport
from ppo_dist.types import Annotation, Floats, Ints, TrainSequence, Weights
from ppo_dist.vitals import Pulse

MEGABYTE = 2**20


@dataclass(frozen=True)
class Seat:
    """Where a worker stands: its rank, the number of ranks, and the address where they meet.

    Example: Seat(rank=0, world=2, address="10.0.0.7", port=29411, device="cuda")
    """

    rank: int
    world: int
    address: str
    port: int
    device: device.DeviceKind


@dataclass(frozen=True, eq=False)
class UpdateShard:
    """One rank's part of one update: the sequences of as many micro-batches as every other rank
    has, for each of the two models; none where the model learns nothing. With a shared trunk all
    are the policy's. Rows are packed by the rank, which is less to send, and a rank's own work.
    """

    policy: tuple[tuple[TrainSequence, ...], ...]
    critic: tuple[tuple[TrainSequence, ...], ...]
    counts: TokenCounts


class Asked(NamedTuple):
    """A sequence to be annotated: its tokens, how many are the prompt's, and the log-probabilities
    that its rollout worker told (of a labelled example: none).

    Example: Asked(tokens_T=[8, 5, 3, 5, 8, 1], prompt_tokens=3, logprobs_R=[-.1, -.7, -.01])
    """

    tokens_T: Ints
    prompt_tokens: int
    logprobs_R: Floats


@functools.lru_cache(maxsize=1)
def probe(nbytes: int) -> NamedTensors:
    """About that many bytes to send, where there is no model yet."""
    numbers = torch.arange(nbytes // 8)
    return [(f"probe.{at}", numbers[at : at + MEGABYTE]) for at in range(0, len(numbers), MEGABYTE)]


def cannot_compile(kind: device.DeviceKind) -> str | None:
    """See models.compiled.why_not."""
    from ppo_dist.models.compiled import why_not  # torch's compiler loads slowly

    return why_not(kind)


class LearnerWorker:
    """Holds this rank's shards. All ranks get the same calls in the same order."""

    def __init__(
        self, config: Config, model_path: str, sender: WeightSender, seat: Seat, resume: Path | None
    ) -> None:
        self._device = device.prepare(seat.device, config.learner.threads)
        deadline_s = config.learner.deadline_s
        join_group(seat.rank, seat.world, seat.address, seat.port, seat.device, deadline_s)
        torch.manual_seed(config.run.seed + seat.rank)
        self._config, self._seat, self._sender = config, seat, sender
        self._reuses_logprobs = reuses_logprobs(config)
        self._roles = Roles(config, model_path, self._device, seat.rank, resume)
        self._steps, self._pulse, self._rate = 0, Pulse(), Rate(self._device, config.learner.dtype)

    def annotate(self, shard: list[list[Asked]], imitation: bool) -> list[list[Annotation]]:
        """Annotations, micro-batch by micro-batch; with `imitation` by the policy alone, at
        temperature 1. Without a pass of it, the rollout workers' log-probabilities are taken over.
        """
        if not imitation:
            self._roles.reinforce()
        with torch.no_grad(), self._at_work("imitate" if imitation else "annotate"):
            annotated = [self._annotate(rows, imitation) for rows in shard]
        if imitation:  # an evaluation, and what follows it is generated
            self._give_way()
        return annotated

    def update(self, shards: list[UpdateShard], coefficients: Coefficients) -> StepReport:
        """One optimizer step of each model for each shard, in order. A model without live tokens
        stays as it is.
        """
        self._roles.is_trained = True
        if self._steps == 0:  # what the first annotations left would lie between activations
            device.free_cache(self._device)
        with self._at_work("update"), self._rate.measured():
            reports = tuple(self._update(shard, coefficients) for shard in shards)
        self._steps += 1
        return StepReport(reports, (self._pulse.vitals(),), self._rate.mfu)

    def publish(self, version: int) -> Weights | None:
        """Sends the policy out from rank 0; the others only lend their shards."""
        sent = None
        with self._at_work("publish"):
            if self._seat.rank == 0:
                sent = self._sender.publish(version, self._roles.published())
            else:
                for _ in self._roles.published():
                    pass
        self._give_way()
        return sent

    def _give_way(self) -> None:
        """Where learners and rollout workers take turns, it is the others' now."""
        if self._config.cluster.placement == "colocated":
            self._roles.sleep()

    def save_policy(self, folder: Path) -> None:
        """See Roles."""
        self._roles.save_policy(folder)

    def save_checkpoint(self, folder: Path) -> None:
        """See Roles."""
        self._roles.save_checkpoint(folder)

    @contextlib.contextmanager
    def _at_work(self, stage: str) -> Iterator[None]:
        """Counts the seconds, and traces them in the steps that the config asks for."""
        begin, is_traced = time.perf_counter(), 1 <= self._steps <= self._config.train.profile_steps
        name = f"learner-{self._seat.rank}-{stage}-{self._steps}.json"
        file = Path(self._config.run.dir) / "profile" / name
        with device.traced(file) if is_traced else contextlib.nullcontext():
            yield
        if stage != "imitate":  # that is evaluation, not the step
            self._pulse.add(time.perf_counter() - begin)

    def _annotate(self, asked: list[Asked], imitation: bool) -> list[Annotation]:
        # a rank with nothing to do takes part in the passes of the others
        rows = [(a.tokens_T, a.prompt_tokens) for a in asked] or [(np.zeros(2, np.int64), 1)]
        row = pack_rows(rows, end=True)
        *where, targets_K = (torch.as_tensor(a).to(self._device) for a in vars(row).values())
        temperature = 1.0 if imitation else self._config.rollout.temperature
        temperature_K = torch.full(targets_K.shape, temperature, device=self._device)
        if self._reuses_logprobs and not imitation:
            known = [np.append(a.logprobs_R, 0) for a in asked]  # one state more, as in the row
            logprobs_K = np.concatenate(known or [np.zeros(2)]).astype(np.float32)
            values_K = np.zeros_like(logprobs_K)
        else:
            out: PolicyOutput = self._roles.policy(*where, targets_K, temperature_K)
            logprobs_K, values_K = out.logprobs_K.cpu().numpy(), out.values_K.cpu().numpy()
        reference_K = logprobs_K
        if self._roles.reference is not None and not imitation:
            reference = self._roles.reference(*where, targets_K, temperature_K)
            reference_K = reference.logprobs_K.cpu().numpy()
        if self._roles.critic is not None and not imitation:
            values_K = self._roles.critic(*where).cpu().numpy()
        annotations, begin = [], 0
        for one in asked:
            end = begin + len(one.tokens_T) - one.prompt_tokens
            response = slice(begin, end)
            annotations.append(
                Annotation(
                    logprobs_K[response],
                    reference_K[response],
                    values_K[response],
                    float(values_K[end]),
                )
            )
            begin = end + 1
        return annotations

    def _update(self, shard: UpdateShard, coefficients: Coefficients) -> UpdateReport:
        sums, grad_norm, critic_norm = TermSums(), None, None
        if shard.policy:
            for sequences in shard.policy:
                sums += self._policy_backward(sequences, shard.counts, coefficients)
            of_head = [coefficients.critic_lr] if self._roles.shares_trunk else []
            grad_norm = self._roles.policy.step(coefficients.lr, *of_head)
        if shard.critic:
            critic = self._roles.critic
            assert critic is not None, "annotate() comes before an update with value tokens"
            for sequences in shard.critic:
                sums += self._critic_backward(critic, sequences, shard.counts, coefficients)
            critic_norm = critic.step(coefficients.critic_lr)
        return UpdateReport(shard.counts, sums, grad_norm, critic_norm)

    def _policy_backward(
        self,
        sequences: Sequence[TrainSequence],
        counts: TokenCounts,
        coefficients: Coefficients,
    ) -> TermSums:
        packed = pack(sequences)
        batch = Tensors.of(packed, self._device)
        # the policy that acts is softmax(logits / temperature); imitation is of softmax(logits)
        temperature_K = torch.where(batch.ce_weight_K != 0, 1.0, self._config.rollout.temperature)
        out: PolicyOutput = self._roles.policy(*batch.row, batch.targets_K, temperature_K)
        self._rate.add(self._roles.policy_cost.flops(packed.row))
        loss, sums = policy_loss(batch, out, counts, coefficients, self._config.algorithm)
        if self._roles.shares_trunk:
            of_value, more = value_loss(
                batch, out.values_K, counts, coefficients, self._config.algorithm
            )
            loss, sums = loss + of_value, sums + more
        self._roles.policy.backward(loss)
        return sums

    def _critic_backward(
        self,
        critic: Engine,
        sequences: Sequence[TrainSequence],
        counts: TokenCounts,
        coefficients: Coefficients,
    ) -> TermSums:
        packed = pack(sequences)
        batch = Tensors.of(packed, self._device)
        values_K = critic(*batch.row)
        self._rate.add(self._roles.critic_cost.flops(packed.row))
        loss, sums = value_loss(batch, values_K, counts, coefficients, self._config.algorithm)
        critic.backward(loss)
        return sums
