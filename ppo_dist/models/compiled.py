"""Layers through torch.compile, which fuses what is between their matrix products."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from ppo_dist import device
from ppo_dist.models.packing import ATTENTION, attend

# of a layer, all models of a process together: with and without gradients, with adapters switched
# off, frozen; beyond torch's own limit (8) it would go on uncompiled
VARIANTS = 64


def why_not(kind: device.DeviceKind) -> str | None:
    """Why this process cannot compile for such a device; tried by compiling something small."""
    device.before_compiling(kind)
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=kind))
    except Exception as error:  # of the compiler's own kinds, many of them
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"torch cannot compile ({said}): install {device.compiler(kind)}, or set it to false"
    return None


def compile_layers(trunk: nn.Module) -> None:
    """In place, each when it is first called; once for all that are alike, and for rows of any
    length above 1. Attention is left as it is: the shapes of its tables are others in each row.

    Raises:
        ValueError: the model is not made of transformers' layers.
    """
    layers = [part for part in trunk.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"compile: {type(trunk).__name__} has no layers of transformers'")
    apart = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
    AttentionInterface.register(ATTENTION, apart)
    for layer in layers:
        layer.compile(dynamic=True, recompile_limit=VARIANTS)
