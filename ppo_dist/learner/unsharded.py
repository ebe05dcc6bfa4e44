"""ZeRO stage 0: every rank has all of a module and of its optimizer's state, so there is nothing
for DeepSpeed to do.

The sum over the ranks is made of all gradients at once, in fp32. A module in bf16 has masters in
fp32, which the optimizer sees; gradients of micro-batches add up beside them. Of fp32 the
parameters are the masters themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_dist.config.workers import LearnerSection
from ppo_dist.learner import shards
from ppo_dist.learner.optimizers import Asleep, groups, optimizer


class Unsharded:
    """A module and its optimizer, both whole on each rank; as ZeroEngine is used."""

    def __init__(
        self,
        module: nn.Module,
        learner: LearnerSection,
        max_grad_norm: float,
        where: torch.device,
        apart: nn.Module | None = None,
    ) -> None:
        """Takes the memory of the optimizer's state."""
        self.module = module.to(where)
        self._limit = max_grad_norm if max_grad_norm > 0 else math.inf
        self._asleep = Asleep()
        live = groups(module, apart)
        self._masters = {p: _master(p) for group in live for p in group["params"]}
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(functools.partial(_add_to, master))
        seen = [{"params": [self._masters[p] for p in group["params"]]} for group in live]
        self._optimizer = optimizer(seen, learner)
        self._gradients: torch.Tensor | None = None
        self._hold_gradients()
        self._optimizer.step()  # changes nothing but that the state is there, which counts it
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        self._release_gradients()

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            self._hold_gradients()
        return self.module(*args)

    def sleep(self) -> None:
        """See ZeroEngine; parameters in fp32 stay, as forward passes need them."""
        masters = [m for p, m in self._masters.items() if m is not p]
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        self._asleep.send([*masters, *states])

    def backward(self, loss_sum: torch.Tensor) -> None:
        """See ZeroEngine."""
        loss_sum.backward()  # type: ignore[no-untyped-call]

    def step(self, *lrs: float) -> float:
        """See ZeroEngine."""
        assert self._gradients is not None, "a pass comes before a step"
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._gradients)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._masters.values()), self._limit))
        if math.isfinite(norm):
            for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            self._optimizer.step()
            self._copy_masters()
        self._release_gradients()
        return norm

    def parameters(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """See ZeroEngine."""
        yield from ((name, p.detach()) for name, p in self.module.named_parameters())

    def save(self, folder: Path) -> None:
        """See ZeroEngine."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        shards.write(folder, rank, self._pieces()[rank::world], self._optimizer.state)

    def load(self, folder: Path) -> None:
        """See ZeroEngine."""
        shards.read(folder, self._pieces(), self._optimizer.state)
        self._copy_masters()

    def _pieces(self) -> list[shards.Piece]:
        return [
            shards.Piece(name, 0, p.numel(), p.numel(), self._masters[p], 0)
            for name, p in self.module.named_parameters()
            if p in self._masters
        ]

    def _hold_gradients(self) -> None:
        """Takes their memory in one piece before the first forward pass, if a step has given it
        back: a backward pass would put them among activations, and leave holes for ever.
        """
        if self._gradients is not None:
            return
        self._asleep.bring_back()
        masters = list(self._masters.values())
        sizes = [master.numel() for master in masters]
        self._gradients = torch.zeros(sum(sizes), device=next(iter(self._masters)).device)
        for master, part in zip(masters, torch.split(self._gradients, sizes), strict=True):
            master.grad = part.view_as(master)

    def _release_gradients(self) -> None:
        self._gradients = None
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)


def _master(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float()


@torch.no_grad()
def _add_to(master: torch.Tensor, parameter: torch.Tensor) -> None:
    assert master.grad is not None and parameter.grad is not None
    master.grad.add_(parameter.grad)
    parameter.grad = None
