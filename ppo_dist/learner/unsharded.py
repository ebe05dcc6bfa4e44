"""What DeepSpeed does by itself at stages 1 to 3, and at stage 0 leaves to torch's optimizer: it
clips, tells the norm, leaves a step out that is not finite, and has its memory from the start.
"""

from __future__ import annotations

import math
from typing import Any

import torch


class _NotFinite(Exception):
    """Ends a step before the optimizer changes anything; the same on all ranks."""


class Unsharded:
    """The optimizer's steps of a DeepSpeed engine at stage 0."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """Takes the memory of the optimizer's state; the optimizer has made no step yet, and has a
        learning rate of 0.
        """
        self._engine, self._optimizer = engine, optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._limit = max_grad_norm if max_grad_norm > 0 else math.inf
        self._norm: float | None = None
        self.hold_gradients()
        optimizer.step()  # changes nothing but that the state is there, which counts it
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        optimizer.zero_grad()
        optimizer.register_step_pre_hook(self._clip_and_measure)
        if torch.distributed.get_world_size() == 1:
            # else all gradients are copied into one buffer, summed over nobody, and copied back
            engine.enable_backward_allreduce = False

    def step(self) -> float:
        """Returns the gradient norm before clipping; if that is not finite, nothing was changed."""
        try:
            self._engine.step()
        except _NotFinite:
            self._optimizer.zero_grad()
        assert self._norm is not None, "the optimizer's hook runs in every step"
        return self._norm

    def hold_gradients(self) -> None:
        """Takes their memory in one piece before the first forward pass, if a step has given it
        back: a backward pass would put them among activations, and leave holes for ever.
        """
        first = self._parameters[0]
        if first.grad is not None:
            return
        sizes = [p.numel() for p in self._parameters]
        flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for parameter, part in zip(self._parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def _clip_and_measure(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._limit))
        if not math.isfinite(self._norm):
            raise _NotFinite
