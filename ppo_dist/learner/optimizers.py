"""What both kinds of engine step with: torch's own optimizers, so nothing is compiled and CPU
offload needs no compiler. And where their memory is while nothing is learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ppo_dist.config.workers import AdamW, LearnerSection


def groups(module: nn.Module, apart: nn.Module | None) -> list[dict[str, Any]]:
    """Trained parameters: the module's, then those of a part with a learning rate of its own."""
    live = {id(p): p for p in module.parameters() if p.requires_grad}
    own = [] if apart is None else [live.pop(id(p)) for p in apart.parameters()]
    return [{"params": group} for group in (list(live.values()), own) if group]


def optimizer(parameters: list[dict[str, Any]], learner: LearnerSection) -> torch.optim.Optimizer:
    """As the config has it, with a learning rate of 0."""
    chosen = learner.optimizer
    if isinstance(chosen, AdamW):
        return torch.optim.AdamW(
            parameters,
            lr=0.0,
            betas=chosen.betas,
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(parameters, lr=0.0, momentum=chosen.momentum)


class Asleep:
    """Tensors that wait on the CPU, each with the device where it belongs."""

    def __init__(self) -> None:
        self.tensors: list[tuple[torch.Tensor, torch.device]] = []

    def send(self, tensors: Iterable[Any]) -> None:
        """What else is among them stays; while some are away nothing changes, as where they belong
        would be forgotten.
        """
        if not self.tensors:
            self.tensors = [(t, t.device) for t in tensors if isinstance(t, torch.Tensor)]
            for tensor, _ in self.tensors:
                tensor.data = tensor.data.to("cpu")

    def bring_back(self) -> None:
        """Each to its device."""
        for tensor, where in self.tensors:
            tensor.data = tensor.data.to(where)
        self.tensors = []
