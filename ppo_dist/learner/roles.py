"""The roles that models play on one rank (policy, critic and reference): how they begin, sleep and
are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ppo_dist import device, files
from ppo_dist.config import Config, RunError
from ppo_dist.learner import export, shards
from ppo_dist.learner.engine import Engine, barrier, frozen, make_engine, model_dtype, sharded
from ppo_dist.learner.flops import Cost
from ppo_dist.models.critic import load_critic
from ppo_dist.models.lora import adapters_off, add_adapters, merged
from ppo_dist.models.policy import PolicyModel, PolicyOutput, load_policy

MEGABYTE = 2**20
LAST_FILE = "random-{}.safetensors"  # that a rank writes into a checkpoint
REINFORCED = "reinforced"  # in a checkpoint: the reference is fixed, and is not to be reset again


class Roles:
    """This rank's shards. `critic` and `reference` are there from `reinforce` on, where the config
    has them. All ranks make the same calls in the same order.
    """

    def __init__(
        self,
        config: Config,
        model_path: str,
        where: torch.device,
        rank: int,
        resume: Path | None,
    ) -> None:
        self._config, self._learner = config, config.learner
        self._model_path, self._device, self._rank = model_path, where, rank
        self.is_trained = resume is not None
        self.shares_trunk = config.algorithm.has_critic and config.critic.shared
        self._policy_model = self._load_policy(model_path, self.shares_trunk)
        if config.model.lora is not None:
            add_adapters(self._policy_model.lm, config.model.lora, config.run.seed)
        self.policy_cost = Cost.of(self._policy_model.lm)
        self.policy = make_engine(
            self._policy_model,
            config.learner,
            config.learner.max_grad_norm,
            where,
            apart=self._policy_model.value_head,
        )
        self._reinforced = False
        self.reference: Callable[..., PolicyOutput] | None = None
        self.critic: Engine | None = None
        self._reference_folder: Path | None = None
        self._reference_sums: dict[str, dict[str, Any]] = {}  # as rank 0 has written it
        if resume is not None:
            self._resume(resume)

    def reinforce(self) -> None:
        """Makes reference and critic, once."""
        if not self._reinforced:
            self._begin_reinforcement()

    def save_policy(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder, whole or not at all."""
        if self._rank != 0:
            for _ in self.published():
                pass
        else:
            state = {name: tensor.cpu().clone() for name, tensor in self.published()}
            trust = self._config.model.trust_remote_code
            export.write(folder, self._policy_model.lm, state, self._model_path, trust)
        barrier()

    def save_checkpoint(self, folder: Path) -> None:
        """Writes this rank's part of all that training depends on."""
        self.policy.save(folder / "policy")
        if self.critic is not None:
            self.critic.save(folder / "critic")
        if self._rank == 0 and self._reinforced:
            (folder / REINFORCED).touch()
        if self._rank == 0 and self._reference_folder is not None:
            self._copy_reference(self._reference_folder, folder / "reference")
        save_file({"state": torch.get_rng_state()}, folder / LAST_FILE.format(self._rank))
        barrier()

    def sleep(self) -> None:
        """Frees what memory of the device only training needs, until it goes on."""
        for engine in (self.policy, self.critic):
            if engine is not None:
                engine.sleep()
        device.free_cache(self._device)

    def published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The language model's parameters as others know them. Every rank must take all."""
        parameters = self.policy.parameters(self._config.transport.bucket_mb * MEGABYTE)
        own = export.LM
        named = ((n.removeprefix(own), p) for n, p in parameters if n.startswith(own))
        return merged(self._policy_model.lm, named)

    def _load_policy(self, path: str, has_value_head: bool = False) -> PolicyModel:
        dtype, trust = model_dtype(self._learner), self._config.model.trust_remote_code
        lm = sharded(self._learner, lambda: load_policy(path, dtype, trust))
        self._prepare(lm)
        return PolicyModel(lm.train(), self._learner.logits_chunk, has_value_head)

    def _prepare(self, trunk: PreTrainedModel) -> None:
        if self._learner.gradient_checkpointing:
            trunk.gradient_checkpointing_enable({"use_reentrant": False})
        if self._learner.compile:
            from ppo_dist.models.compiled import compile_layers  # torch's compiler loads slowly

            compile_layers(trunk)

    def _load_critic(self, path: str) -> Engine:
        dtype, trust = model_dtype(self._learner), self._config.model.trust_remote_code
        critic = sharded(self._learner, lambda: load_critic(path, dtype, trust))
        self._prepare(critic.trunk)
        self.critic_cost = Cost.of(critic.trunk)
        limit = self._learner.critic_max_grad_norm
        return make_engine(critic.train(), self._learner, limit, self._device)

    def _load_reference(self, path: str) -> None:
        if self._config.reference is None:
            return
        if self._config.model.lora is None:
            self.reference = frozen(self._learner, self._load_policy(path), self._device)
        else:
            self.reference = self._without_adapters

    def _without_adapters(self, *row: torch.Tensor) -> PolicyOutput:
        with adapters_off(self._policy_model.lm):
            out: PolicyOutput = self.policy(*row)
        return out

    def _begin_reinforcement(self) -> None:
        """Fixes the reference and starts the critic, both from the policy as it is now.

        They come through a folder on disk, so that under ZeRO-3 no rank's device ever holds a whole
        model.
        """
        self._reinforced, current = True, self._model_path
        if self.is_trained and (self._resets_reference or self._critic_starts_from_policy):
            folder = Path(self._config.run.dir) / "reference"
            self.save_policy(folder)
            current = str(folder)
            if self._resets_reference:
                self._own_reference(folder)
        self._load_reference(current if self._resets_reference else self._initial_reference)
        if self._config.algorithm.has_critic and not self.shares_trunk:
            self.critic = self._load_critic(self._config.critic.path or current)

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
        self.policy.load(folder / "policy")
        self._reinforced = (folder / REINFORCED).exists()
        if self._reinforced:
            if (folder / "reference").exists():
                self._restore_reference(folder / "reference")
            self._load_reference(str(self._reference_folder or self._initial_reference))
        if (folder / "critic").exists():
            self.critic = self._load_critic(self._config.critic.path or self._model_path)
            self.critic.load(folder / "critic")
        self._resume_random(folder)

    def _resume_random(self, folder: Path) -> None:
        """This rank's random state. Where there are more or fewer ranks than wrote, each starts
        anew, from what the first one's would draw next.
        """
        is_same = shards.ranks(folder / "policy") == torch.distributed.get_world_size()
        rank = self._rank if is_same else 0
        torch.set_rng_state(load_file(folder / LAST_FILE.format(rank))["state"])
        if not is_same:
            torch.manual_seed(int(torch.randint(2**62, ())) + self._rank)

    def _restore_reference(self, kept: Path) -> None:
        """Makes a checkpoint's reference the run's own: checkpoints come and go."""
        folder = Path(self._config.run.dir) / "reference"
        if self._rank == 0:
            with files.aside(folder) as made:
                shutil.copytree(kept, made, dirs_exist_ok=True)
        barrier()
        self._own_reference(folder)

    def _own_reference(self, folder: Path) -> None:
        self._reference_folder = folder
        if self._rank == 0:
            self._reference_sums = files.sums(folder)

    def _copy_reference(self, folder: Path, target: Path) -> None:
        """A copy, since a link would have one flipped bit spoil all checkpoints.

        Raises:
            RunError: the reference is not what was written; an older checkpoint has it.
        """
        shutil.copytree(folder, target)
        if files.sums(target) != self._reference_sums:
            raise RunError(f"{folder}: the reference is damaged on the disk")
