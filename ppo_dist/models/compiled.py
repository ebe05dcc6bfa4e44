"""Layers through torch.compile, which fuses what is between their matrix products."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from ppo_dist.device import DeviceKind
from ppo_dist.models.packing import ATTENTION, attend


def why_not(kind: DeviceKind) -> str | None:
    """What torch says where it cannot compile, as without a C++ compiler (on a GPU: Triton)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=kind))
    except Exception as error:  # of the compiler's own kinds, many of them
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def compile_layers(trunk: nn.Module) -> None:
    """In place, each when it is first called; once for all that are alike, and for rows of any
    length. Attention is left as it is: the shapes of its tables are others in each row.

    Raises:
        ValueError: the model is not made of transformers' layers.
    """
    layers = [part for part in trunk.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"learner.compile: {type(trunk).__name__} has no layers of transformers'")
    apart = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
    AttentionInterface.register(ATTENTION, apart)
    for layer in layers:
        layer.compile(dynamic=True)
