"""Adapters merged into weights that are coarser than they."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from ppo_dist.config.data import Lora
from ppo_dist.models.lora import _rounded, add_adapters, merged
from ppo_dist.models.policy import load_policy

STEP = 2.0**-7  # of bf16 from 1 to 2


def test_rounded_by_lot_the_mean_is_exact_and_no_weight_turns_back() -> None:
    for value in (1.0, -1.0):
        before = torch.full((200, 200), value).to(torch.bfloat16)
        for part in (0.1, 0.3, 0.9):
            exact = torch.full((200, 200), value * (1 + part * STEP))
            made = _rounded(exact, torch.bfloat16, "name")
            assert set(made.float().unique().tolist()) == {value, value * (1 + STEP)}
            grown = float(((made.float() - value) / (value * STEP)).mean())
            assert abs(grown - part) < 0.015
            assert (made.abs() >= before.abs()).all(), "by the same lots"
            before = made


def test_what_bf16_holds_and_what_is_not_finite_stays() -> None:
    kept = torch.tensor([0.0, -0.0, 1.5, -3e38, 1e-40, float("inf"), float("-inf")])
    kept = kept.to(torch.bfloat16)
    assert torch.equal(_rounded(kept.float(), torch.bfloat16, "name"), kept)
    assert _rounded(torch.tensor([float("nan")]), torch.bfloat16, "name").isnan().all()
    fine = torch.tensor([1.0001])
    assert torch.equal(_rounded(fine, torch.float32, "name"), fine)


def test_changes_far_below_a_step_are_published(tiny_models: dict[str, Path]) -> None:
    """The nearest weight of bf16 is the one of before, for nearly all of them."""
    lm = load_policy(str(tiny_models["llama"]), torch.bfloat16)
    add_adapters(lm, Lora(rank=2, alpha=2), seed=0)
    layers = {name: part for name, part in lm.named_modules() if isinstance(part, LoraLayer)}
    start = {f"{n}.weight": part.get_base_layer().weight.detach() for n, part in layers.items()}
    for part in layers.values():
        torch.nn.init.constant_(part.lora_A["default"].weight, 1e-2)
        torch.nn.init.constant_(part.lora_B["default"].weight, 1e-3)
    change = 2 * 1e-2 * 1e-3  # every weight's, where a step is some 1e-4
    published = dict(merged(lm, ((n, p.detach()) for n, p in lm.named_parameters())))
    sums = [(published[name].float() - start[name].float()).sum() for name in start]
    count = sum(weight.numel() for weight in start.values())
    assert float(sum(sums)) / count == pytest.approx(change, rel=0.1)
    nearest = [(w.float() + change).to(torch.bfloat16) for w in start.values()]
    same = sum(int((a == b).sum()) for a, b in zip(nearest, start.values(), strict=True))
    assert same > 0.7 * count
    again = dict(merged(lm, ((n, p.detach()) for n, p in lm.named_parameters())))
    assert all(torch.equal(again[name], published[name]) for name in start)
