"""Low-rank adapters: put in, switched off, merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppo_dist.config.data import Lora

NAME = "default"  # peft's name of the one adapter


def add_adapters(lm: PreTrainedModel, section: Lora, seed: int) -> None:
    """Puts adapters into a model, in place; everything else is frozen. They begin as zero, and the
    same on every rank.
    """
    chosen = section.targets
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=0.0,
        target_modules=chosen if isinstance(chosen, str) else list(chosen),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is what it was before it had adapters."""
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(
    model: nn.Module, named: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, name by name, as the model without adapters would have them: W + (α/r)·B·A.

    At most one matrix is held beside what `named` gives. A model without adapters passes through.
    What is coarser than fp32 is rounded by lot: most changes are far below the nearest step.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    base = low = torch.zeros(0)
    for name, tensor in named:
        owner = name.split(".base_layer.")[0].split(".lora_")[0]
        if owner not in layers:
            yield name, tensor
        elif name.endswith(".base_layer.weight"):
            base = tensor.clone()
        elif f".lora_A.{NAME}." in name:
            low = tensor.float()
        elif f".lora_B.{NAME}." in name:
            change = (tensor.float() @ low) * layers[owner].scaling[NAME]
            if isinstance(layers[owner].get_base_layer(), Conv1D):
                change = change.T  # GPT-2 keeps its matrices the other way round
            yield f"{owner}.weight", _rounded(base.float() + change, base.dtype, owner)
        else:
            yield name.replace(".base_layer.", "."), tensor


def _rounded(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """To bf16 up or down, so that the mean is exact; by the same lots in every version, so that a
    weight follows what it grows by. What bf16 holds, and what is not finite, stays as it is.
    """
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    lots = torch.Generator(exact.device).manual_seed(seed)
    bits = exact.contiguous().view(torch.int32)
    draws = torch.empty_like(bits).random_(0, 1 << 16, generator=lots)
    cut = ((bits + draws) & -(1 << 16)).view(torch.float32)
    return torch.where(exact.isfinite(), cut, exact).to(dtype)
