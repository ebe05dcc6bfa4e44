"""ZeRO stage 0: every rank has all of a module and of its optimizer's state, so there is nothing
for DeepSpeed to do.

Gradients of micro-batches add up in fp32, in one piece of memory, which is summed over the ranks
at once. A module in bf16 has masters in fp32, which the optimizer sees; in fp32 the parameters are
the masters themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_dist import device
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
        for parameter in self._masters:
            parameter.register_post_accumulate_grad_hook(self._add)
        # what adds a parameter's gradient up; torch would make it in the first forward pass, among
        # activations, where it would stay and leave holes
        self._adders = [torch.autograd.graph.get_gradient_edge(p).node for p in self._masters]
        seen = [{"params": [self._masters[p] for p in group["params"]]} for group in live]
        self._optimizer = optimizer(seen, learner)
        self._gradients: torch.Tensor | None = None  # all of them, flat
        self._sums: dict[torch.Tensor, torch.Tensor] = {}  # each parameter's part of it
        self._begun: set[torch.Tensor] = set()  # those that have a gradient in this update
        self._make_state()

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            self._hold_gradients()
        return self.module(*args)

    def sleep(self) -> None:
        """See ZeroEngine; parameters in fp32 stay, as forward passes need them."""
        masters = [m for p, m in self._masters.items() if m is not p]
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        self._asleep.send([*masters, *states])
        self._gradients, self._sums = None, {}

    def backward(self, loss_sum: torch.Tensor) -> None:
        """See ZeroEngine."""
        loss_sum.backward()  # type: ignore[no-untyped-call]

    def step(self, *lrs: float) -> float:
        """See ZeroEngine."""
        assert self._gradients is not None, "a pass comes before a step"
        for parameter in self._masters.keys() - self._begun:
            self._sums[parameter].zero_()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._gradients)
        norm = float(torch.nn.utils.get_total_norm(self._sums.values()))
        if norm > self._limit:
            self._gradients.mul_(self._limit / norm)
        if math.isfinite(norm):
            for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            self._change()
        self._begun.clear()
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

    def _make_state(self) -> None:
        """By a step that changes nothing but that the state is there, which counts it."""
        self._hold_gradients()
        self.step(*[0.0] * len(self._optimizer.param_groups))
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].zero_()

    def _hold_gradients(self) -> None:
        """Takes their memory before the first forward pass: a backward pass would put them among
        activations, and leave holes for ever. Until the next sleep it stays, since on a CPU to
        touch fresh memory takes longer than to add gradients up in it.
        """
        if self._gradients is not None:
            return
        self._asleep.bring_back()
        sizes = [parameter.numel() for parameter in self._masters]
        where = next(iter(self._masters)).device
        self._gradients = device.empty_bytes(4 * sum(sizes), where).view(torch.float32)
        parts = torch.split(self._gradients, sizes)
        self._sums = {p: g.view_as(p) for p, g in zip(self._masters, parts, strict=True)}

    def _add(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter in self._begun:
            self._sums[parameter].add_(gradient)
        else:
            self._sums[parameter].copy_(gradient)
            self._begun.add(parameter)

    def _change(self) -> None:
        for parameter, master in self._masters.items():
            master.grad = self._sums[parameter]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)


def _master(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float()
