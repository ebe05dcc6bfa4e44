"""A module under DeepSpeed ZeRO: sharded, trained, saved and gathered.

Four settings are what keeps gradients right here (each is held by a test):
  * `managed_gradient_accumulation: false`: any number of backward passes before a step. In the
    default mode ZeRO with CPU offload keeps only the last one's gradients.
  * `backward(loss, scale_wrt_gas=False)` of a loss already multiplied by the world size, since
    DeepSpeed averages over ranks.
  * `grad_accum_dtype: fp32`: those of bf16 models else add up in bf16, which takes nothing in that
    is less than a 256th of the sum. At stage 1 that gets another optimizer of DeepSpeed's, which
    neither shards nor saves as this file knows it, so bf16 runs there as at stage 2. With CPU
    offload at stages 1 and 2 it would keep the sum on the GPU, and a NaN in it for good: not there.
  * `gradient_clipping` is always written: DeepSpeed clips at 1.0 unless told otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import deepspeed
import deepspeed.comm
import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from ppo_dist.config.workers import LearnerSection
from ppo_dist.device import DTYPES, pins_memory
from ppo_dist.learner import shards
from ppo_dist.learner.optimizers import Asleep, groups, optimizer
from ppo_dist.learner.process_group import limit_waits
from ppo_dist.learner.unsharded import Unsharded

M = TypeVar("M", bound=nn.Module)


def _zero_config(learner: LearnerSection, max_grad_norm: float = 0.0) -> dict[str, Any]:
    bf16 = learner.dtype == "bf16"
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    data_types = {}
    if learner.offload == "none" or learner.zero_stage == 3:
        data_types["grad_accum_dtype"] = "fp32"
        zero["stage"] = max(learner.zero_stage, 2 if bf16 else 1)
    if learner.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pins_memory()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "data_types": data_types,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 10**9,
    }


def sharded(learner: LearnerSection, load: Callable[[], M]) -> M:
    """What `load` makes; under ZeRO-3 parameters are split over the ranks while they are read."""
    if learner.zero_stage < 3:
        return load()
    # transformers looks for a living HfDeepSpeedConfig; it must be gone before the next model
    guard = HfDeepSpeedConfig(_zero_config(learner))
    try:
        return load()
    finally:
        del guard
        gc.collect()


def frozen(learner: LearnerSection, module: nn.Module, device: torch.device) -> nn.Module:
    """A module for forward passes alone; under ZeRO-3 it stays split over the ranks."""
    module.requires_grad_(False).eval()
    if learner.zero_stage < 3:
        return module.to(device)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": learner.dtype == "bf16"},
    }
    engine: nn.Module = deepspeed.initialize(model=module, config=config)[0]
    limit_waits(learner.deadline_s)
    engine.eval()
    return engine


class ZeroEngine:
    """A module and its optimizer under DeepSpeed ZeRO. Every method is called on all ranks, or on
    none.
    """

    def __init__(
        self,
        module: nn.Module,
        learner: LearnerSection,
        max_grad_norm: float,
        apart: nn.Module | None = None,
    ) -> None:
        """`apart` is a part of the module with a learning rate of its own. Frozen parameters stay
        as they are.
        """
        self._stage = learner.zero_stage
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer(groups(module, apart), learner),
            config=_zero_config(learner, max_grad_norm),
        )
        limit_waits(learner.deadline_s)
        self._world = torch.distributed.get_world_size()
        self._asleep = Asleep()

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        module: nn.Module = self._engine.module
        return module

    def sleep(self) -> None:
        """Moves master weights and the optimizer's state, which are most of the memory and which
        forward passes do not need, to the CPU; what needs them brings them back.

        DeepSpeed's own `offload_states` does that under ZeRO-3 for its FusedAdam alone.
        """
        self._forget_views()
        states = [value for state in self._state.values() for value in state.values()]
        self._asleep.send([*self._masters, *states])

    def _forget_views(self) -> None:
        """At stages 1 and 2 DeepSpeed keeps a view of each parameter's part of them, for its own
        checkpoints alone; with it the memory would stay.
        """
        if self._stage == 3:
            return
        for parameter in self._engine.module.parameters():
            if parameter.requires_grad and (views := parameter._hp_mapping) is not None:
                views.hp_fragment, views.optim_fragment = None, {}

    def backward(self, loss_sum: torch.Tensor) -> None:
        """Adds the gradient of a sum over this rank's tokens that is already divided by the global
        count.
        """
        self._asleep.bring_back()
        self._engine.backward(loss_sum * self._world, scale_wrt_gas=False)

    def step(self, *lrs: float) -> float:
        """One optimizer step with everything since the last one, with the learning rate of the
        module and, where there is one, that of the part that stands apart. Returns the global
        gradient norm before clipping; if that is not finite, nothing was changed.
        """
        for group, lr in zip(self._engine.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        self._engine.step()  # DeepSpeed itself leaves a step out whose norm is not finite
        return float(self._engine.get_global_grad_norm())

    def parameters(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters whole, name by name; under ZeRO-3 at most about `bucket_bytes` of them
        exist at a time.

        Tied parameters come once, under their first name. Tensors are valid until the next one is
        taken.
        """
        named = list(self.module.named_parameters())
        if self._stage < 3:
            yield from ((name, p.detach()) for name, p in named)
            return
        for bucket in _buckets(named, bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                yield from ((name, p.detach()) for name, p in bucket)

    def save(self, folder: Path) -> None:
        """Writes parameters and optimizer, each rank its part. What is frozen is left out."""
        shards.write(folder, torch.distributed.get_rank(), self._pieces(), self._state)

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote at any stage and world size."""
        shards.read(folder, self._pieces(), self._state)
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
        else:
            zero.checkpoint_event_prologue()
            for index in range(len(self._masters)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero.checkpoint_event_epilogue()

    @property
    def _masters(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that this rank's optimizer sees."""
        zero = self._engine.optimizer
        masters: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero.single_partition_of_fp32_groups
        )
        return masters

    @property
    def _state(self) -> shards.State:
        state: shards.State = self._engine.optimizer.optimizer.state
        return state

    def _pieces(self) -> list[shards.Piece]:
        """What of the trained parameters this rank's optimizer sees."""
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        where = self._at_stage_3 if self._stage == 3 else self._at_stages_1_and_2
        return [piece for name, p in named for piece in where(name, p)]

    def _at_stages_1_and_2(self, name: str, p: Any) -> Iterator[shards.Piece]:
        if (where := p._hp_mapping) is not None:
            part, place = where.lp_fragment_address, where.hp_fragment_address
            flat = self._masters[where.param_group_index]
            yield shards.Piece(name, part.start, part.numel, p.numel(), flat, place.start)

    def _at_stage_3(self, name: str, p: Any) -> Iterator[shards.Piece]:
        zero = self._engine.optimizer
        index, offset, share = zero.grad_position[zero.get_param_id(p)]
        start = torch.distributed.get_rank() * share
        if (count := min(share, p.ds_numel - start)) > 0:  # the last shares are padded
            yield shards.Piece(name, start, count, p.ds_numel, self._masters[index], offset)


Engine: TypeAlias = Unsharded | ZeroEngine


def make_engine(
    module: nn.Module,
    learner: LearnerSection,
    max_grad_norm: float,
    where: torch.device,
    apart: nn.Module | None = None,
) -> Engine:
    """What trains a module at the stage that the config asks for; see ZeroEngine."""
    if learner.zero_stage == 0:
        return Unsharded(module, learner, max_grad_norm, where, apart)
    return ZeroEngine(module, learner, max_grad_norm, apart)


def _buckets(named: list[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, parameter in named:
        nbytes = parameter.ds_numel * parameter.element_size()
        if bucket and size + nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += nbytes
    if bucket:
        yield bucket


def barrier() -> None:
    """Waits for all learners."""
    torch.distributed.barrier()


def model_dtype(learner: LearnerSection) -> torch.dtype:
    """The number format of weights and activations; the optimizer's own copy is always fp32."""
    return DTYPES[learner.dtype]
