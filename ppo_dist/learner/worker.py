"""A learner worker: one rank of policy, critic and reference. A plain class; cluster/ makes it a
Ray actor.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from ppo_dist import device, files
from ppo_dist.config import Config
from ppo_dist.data.batching import pack_rows
from ppo_dist.learner.engine import ZeroEngine, barrier, frozen, join_group, model_dtype, sharded
from ppo_dist.learner.losses import Tensors, policy_loss, value_loss
from ppo_dist.models.critic import load_critic
from ppo_dist.models.lora import adapters_off, add_adapters, merged
from ppo_dist.models.policy import PolicyModel, PolicyOutput, load_policy
from ppo_dist.protocols import NamedTensors, WeightSender
from ppo_dist.reports import Coefficients, TermSums, TokenCounts, UpdateReport
from ppo_dist.types import Annotation, Ints, MicroBatch, Weights

MEGABYTE = 2**20
REINFORCED = "reinforced"  # in a checkpoint: the reference is fixed, and is not to be reset again


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
    """One rank's part of one update: as many micro-batches as every other rank has, for each of the
    two models; none where the model learns nothing. With a shared trunk all are the policy's.
    """

    policy: tuple[MicroBatch, ...]
    critic: tuple[MicroBatch, ...]
    counts: TokenCounts


@functools.lru_cache(maxsize=1)
def probe(nbytes: int) -> NamedTensors:
    """About that many bytes to send, where there is no model yet."""
    numbers = torch.arange(nbytes // 8)
    return [(f"probe.{at}", numbers[at : at + MEGABYTE]) for at in range(0, len(numbers), MEGABYTE)]


class LearnerWorker:
    """Holds this rank's shards. All ranks get the same calls in the same order."""

    def __init__(
        self, config: Config, model_path: str, sender: WeightSender, seat: Seat, resume: Path | None
    ) -> None:
        self._device = device.prepare(seat.device, config.learner.threads)
        join_group(seat.rank, seat.world, seat.address, seat.port, seat.device)
        torch.manual_seed(config.run.seed + seat.rank)
        self._config, self._learner, self._seat = config, config.learner, seat
        self._model_path, self._sender = model_path, sender
        self._trained = resume is not None
        self._shares_trunk = config.algorithm.has_critic and config.critic.shared
        self._policy_model = self._load_policy(model_path, self._shares_trunk)
        if config.model.lora is not None:
            add_adapters(self._policy_model.lm, config.model.lora, config.run.seed)
        self._policy = ZeroEngine(
            self._policy_model,
            config.learner,
            config.learner.max_grad_norm,
            apart=self._policy_model.value_head,
        )
        self._reinforced = False  # so reference and critic, where the config has them, are there
        self._reference: Callable[..., PolicyOutput] | None = None
        self._critic: ZeroEngine | None = None
        self._reference_folder: Path | None = None
        if resume is not None:
            self._resume(resume)

    # ── what the group calls ──────────────────────────────────────────────────────────────────────

    def annotate(
        self, shard: list[list[tuple[Ints, int]]], imitation: bool
    ) -> list[list[Annotation]]:
        """Annotations of (tokens_T, prompt length) pairs, micro-batch by micro-batch; with
        `imitation` by the policy alone, at temperature 1.
        """
        if not (self._reinforced or imitation):
            self._start_reinforcement()
        with torch.no_grad():
            return [self._annotate(rows, imitation) for rows in shard]

    def update(self, shards: list[UpdateShard], coefficients: Coefficients) -> list[UpdateReport]:
        """One optimizer step of each model for each shard, in order. A model without live tokens
        stays as it is.
        """
        self._trained = True
        return [self._update(shard, coefficients) for shard in shards]

    def publish(self, version: int) -> Weights | None:
        """Sends the policy out from rank 0; the others only lend their shards. Where learners and
        rollout workers take turns, it is the others' then.
        """
        sent = None
        if self._seat.rank == 0:
            sent = self._sender.publish(version, self._published())
        else:
            for _ in self._published():
                pass
        if self._config.cluster.placement == "colocated":
            self._sleep()
        return sent

    def save_policy(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder, whole or not at all."""
        if self._seat.rank != 0:
            for _ in self._published():
                pass
        else:
            state = {name: tensor.cpu().clone() for name, tensor in self._published()}
            self._write_policy(folder, state)
        barrier()

    def save_checkpoint(self, folder: Path) -> None:
        """Writes this rank's part of all that training depends on."""
        self._policy.save(folder / "policy")
        if self._critic is not None:
            self._critic.save(folder / "critic")
        if self._seat.rank == 0 and self._reinforced:
            (folder / REINFORCED).touch()
        if self._seat.rank == 0 and self._reference_folder is not None:
            shutil.copytree(
                self._reference_folder, folder / "reference", copy_function=files.link_or_copy
            )
        torch.save(torch.get_rng_state(), folder / f"random-{self._seat.rank}.pt")
        barrier()

    def _sleep(self) -> None:
        for engine in (self._policy, self._critic):
            if engine is not None:
                engine.sleep()
        device.free_cache(self._device)

    def _published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The language model's parameters as others know them. Every rank must take all."""
        parameters = self._policy.parameters(self._config.transport.bucket_mb * MEGABYTE)
        named = ((n.removeprefix("lm."), p) for n, p in parameters if n.startswith("lm."))
        return merged(self._policy_model.lm, named)

    # ── models ────────────────────────────────────────────────────────────────────────────────────

    def _load_policy(self, path: str, has_value_head: bool = False) -> PolicyModel:
        dtype, trust = model_dtype(self._learner), self._config.model.trust_remote_code
        lm = sharded(self._learner, lambda: load_policy(path, dtype, trust))
        if self._learner.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        return PolicyModel(lm.train(), self._learner.logits_chunk, has_value_head)

    def _load_critic(self, path: str) -> ZeroEngine:
        dtype, trust = model_dtype(self._learner), self._config.model.trust_remote_code
        critic = sharded(self._learner, lambda: load_critic(path, dtype, trust))
        if self._learner.gradient_checkpointing:
            critic.trunk.gradient_checkpointing_enable({"use_reentrant": False})
        return ZeroEngine(critic.train(), self._learner, self._learner.critic_max_grad_norm)

    def _load_reference(self, path: str) -> None:
        if self._config.reference is None:
            return
        if self._config.model.lora is None:
            self._reference = frozen(self._learner, self._load_policy(path), self._device)
        else:
            self._reference = self._without_adapters

    def _without_adapters(self, *row: torch.Tensor) -> PolicyOutput:
        with adapters_off(self._policy_model.lm):
            out: PolicyOutput = self._policy(*row)
        return out

    def _start_reinforcement(self) -> None:
        """Fixes the reference and starts the critic, both from the policy as it is now.

        They come through a folder on disk, so that under ZeRO-3 no rank ever holds a whole model.
        """
        self._reinforced, current = True, self._model_path
        if self._trained and (self._resets_reference or self._critic_starts_from_policy):
            folder = Path(self._config.run.dir) / "reference"
            self.save_policy(folder)
            current = str(folder)
            self._reference_folder = folder if self._resets_reference else None
        self._load_reference(current if self._resets_reference else self._initial_reference)
        if self._config.algorithm.has_critic and not self._shares_trunk:
            self._critic = self._load_critic(self._config.critic.path or current)

    @property
    def _resets_reference(self) -> bool:
        reference = self._config.reference
        if reference is None or reference.path is not None:
            return False
        return reference.reset == "after_supervised"

    @property
    def _critic_starts_from_policy(self) -> bool:
        critic = self._config.critic
        return self._config.algorithm.has_critic and critic.path is None and not critic.shared

    @property
    def _initial_reference(self) -> str:
        reference = self._config.reference
        return (reference and reference.path) or self._model_path

    def _resume(self, folder: Path) -> None:
        self._policy.load(folder / "policy")
        self._reinforced = (folder / REINFORCED).exists()
        if self._reinforced:
            if (folder / "reference").exists():
                self._reference_folder = self._own_reference(folder / "reference")
            self._load_reference(str(self._reference_folder or self._initial_reference))
        if (folder / "critic").exists():
            self._critic = self._load_critic(self._config.critic.path or self._model_path)
            self._critic.load(folder / "critic")
        torch.set_rng_state(torch.load(folder / f"random-{self._seat.rank}.pt", weights_only=True))

    def _own_reference(self, kept: Path) -> Path:
        """A checkpoint's reference as the run's own: checkpoints come and go."""
        folder = Path(self._config.run.dir) / "reference"
        if self._seat.rank == 0:
            aside = folder.with_name(f".{folder.name}.writing")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(kept, aside, copy_function=files.link_or_copy)
            files.replace(aside, folder)
        barrier()
        return folder

    def _write_policy(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        aside = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(aside, ignore_errors=True)
        self._policy_model.lm.save_pretrained(aside, state_dict=state)
        AutoTokenizer.from_pretrained(self._model_path).save_pretrained(aside)
        files.replace(aside, folder)

    # ── passes ────────────────────────────────────────────────────────────────────────────────────

    def _annotate(self, rows: list[tuple[Ints, int]], imitation: bool) -> list[Annotation]:
        row = pack_rows(rows or [(np.zeros(2, np.int64), 1)], end=True)
        *where, targets_K = (torch.as_tensor(a).to(self._device) for a in vars(row).values())
        temperature = 1.0 if imitation else self._config.rollout.temperature
        temperature_K = torch.full(targets_K.shape, temperature, device=self._device)
        out: PolicyOutput = self._policy(*where, targets_K, temperature_K)
        logprobs_K, values_K = out.logprobs_K.cpu().numpy(), out.values_K.cpu().numpy()
        reference_K = logprobs_K
        if self._reference is not None and not imitation:
            reference = self._reference(*where, targets_K, temperature_K)
            reference_K = reference.logprobs_K.cpu().numpy()
        if self._critic is not None and not imitation:
            values_K = self._critic(*where).cpu().numpy()
        annotations, begin = [], 0
        for tokens_T, prompt in rows:
            end = begin + len(tokens_T) - prompt
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
            for micro_batch in shard.policy:
                sums += self._policy_backward(micro_batch, shard.counts, coefficients)
            of_head = [coefficients.critic_lr] if self._shares_trunk else []
            grad_norm = self._policy.step(coefficients.lr, *of_head)
        if shard.critic:
            for micro_batch in shard.critic:
                sums += self._critic_backward(micro_batch, shard.counts, coefficients)
            critic_norm = self._critic_engine.step(coefficients.critic_lr)
        return UpdateReport(shard.counts, sums, grad_norm, critic_norm)

    @property
    def _critic_engine(self) -> ZeroEngine:
        assert self._critic is not None, "annotate() comes before an update with value tokens"
        return self._critic

    def _policy_backward(
        self, micro_batch: MicroBatch, counts: TokenCounts, coefficients: Coefficients
    ) -> TermSums:
        batch = Tensors.of(micro_batch, self._device)
        # the policy that acts is softmax(logits / temperature); imitation is of softmax(logits)
        temperature_K = torch.where(batch.ce_weight_K != 0, 1.0, self._config.rollout.temperature)
        out: PolicyOutput = self._policy(*batch.row, batch.targets_K, temperature_K)
        loss, sums = policy_loss(batch, out, counts, coefficients, self._config.algorithm)
        if self._shares_trunk:
            of_value, more = value_loss(
                batch, out.values_K, counts, coefficients, self._config.algorithm
            )
            loss, sums = loss + of_value, sums + more
        self._policy.backward(loss)
        return sums

    def _critic_backward(
        self, micro_batch: MicroBatch, counts: TokenCounts, coefficients: Coefficients
    ) -> TermSums:
        batch = Tensors.of(micro_batch, self._device)
        values_K = self._critic_engine(*batch.row)
        loss, sums = value_loss(batch, values_K, counts, coefficients, self._config.algorithm)
        self._critic_engine.backward(loss)
        return sums
