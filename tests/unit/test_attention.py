"""Causal attention as plain products against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from ppo_dist.models import attention, kernels
from ppo_dist.models.attention import Masks, by_products, causal_attention
from ppo_dist.models.packing import Packing, attend

# rows, heads, heads of keys, tokens, size, size of values
SHAPES = [(2, 6, 2, 7, 4, 4), (1, 3, 3, 1, 2, 2), (3, 4, 1, 5, 8, 3)]
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tables(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tables:
    """Query, key and value."""
    torch.manual_seed(0)
    rows, heads, shared, tokens, size, of_values = shape
    query, key, value = (
        torch.randn(rows, tokens, h, n, dtype=dtype).transpose(1, 2).requires_grad_()
        for h, n in ((heads, size), (shared, size), (shared, of_values))
    )
    return query, key, value


def by_torch(qkv: Tables, scale: float | None = None) -> torch.Tensor:
    return F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scale, enable_gqa=True)


@pytest.mark.parametrize(
    ("attend_to", "at_a_time"),
    [(by_products, 1), (by_products, 100), (by_products, 1 << 21), (causal_attention, 1 << 21)],
)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_give_the_same_and_the_same_gradients(
    shape: tuple[int, ...],
    first: int,
    scale: float | None,
    at_a_time: int,
    attend_to: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether all tokens ask, or those from `first` on."""
    monkeypatch.setattr(attention, "SCORES", at_a_time)
    own, theirs = tables(shape), tables(shape)
    first = min(first, shape[3] - 1)
    out = attend_to(own[0][:, :, first:], *own[1:], scale, {})
    expected = by_torch(theirs, scale)[:, :, first:]
    torch.testing.assert_close(out, expected)
    towards = torch.randn_like(expected)
    out.backward(towards)
    expected.backward(towards)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_token_sees_a_later_one() -> None:
    own = tables(SHAPES[0])
    before = by_products(*own, None, {})
    with torch.no_grad():
        for table in own:
            table[:, :, 4:] += 1.0
    after = by_products(*own, None, {})
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.isclose(before[:, :, 4:], after[:, :, 4:]).all()


def test_a_mask_is_made_once_for_all_layers() -> None:
    masks: Masks = {}
    for _ in range(3):
        by_products(*tables(SHAPES[0]), None, masks)
    (first,) = masks.values()
    query, key, value = tables(SHAPES[0])
    for _ in range(3):
        causal_attention(query[:, :, 3:], key, value, None, masks)
    assert len(masks) == 2 and next(iter(masks.values())) is first


def test_short_sequences_are_products_on_a_cpu_with_bf16() -> None:
    short, long = (torch.empty(1, 1, tokens, 4, dtype=torch.bfloat16) for tokens in (500, 501))
    has_units = torch.cpu._is_avx512_bf16_supported()
    assert kernels.attends_by_products(short, torch.bfloat16) == has_units
    assert not kernels.attends_by_products(long, torch.bfloat16)
    assert not kernels.attends_by_products(short, torch.float32)
    assert not kernels.attends_by_products(short.to("meta"), torch.bfloat16)


@pytest.mark.parametrize("larger", [1, 8])  # 8: scores up to 20 or so, of which bf16 has few bits
@pytest.mark.parametrize("tokens", [60, 520])
def test_in_bf16_all_is_near_to_what_fp64_gives(tokens: int, larger: int) -> None:
    own = tables((2, 6, 2, tokens, 64, 64), torch.bfloat16)
    exact = tables((2, 6, 2, tokens, 64, 64))
    with torch.no_grad():
        own[0].mul_(larger)
        for rough, fine in zip(own, exact, strict=True):
            fine.copy_(rough)
    out, expected = causal_attention(*own, None, {}), by_torch(exact)
    assert out.dtype == torch.bfloat16
    towards = torch.randn_like(out)
    out.backward(towards)
    expected.backward(towards.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(own, exact, strict=True))]
    for rough, fine in pairs:
        assert rough is not None and fine is not None
        assert float((rough - fine).norm() / fine.norm()) < 0.01 * larger**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiplier_is_a_linear_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 50, dtype=dtype)
    for bias in (layer.bias, None):
        rows = torch.randn(7, 24, dtype=dtype)
        with torch.no_grad():
            found = kernels.multiplier(layer.weight, bias)(rows)
            torch.testing.assert_close(found, F.linear(rows, layer.weight, bias))


def test_gradients_of_a_shared_prompt_are_summed_in_fp32() -> None:
    """By torch, as it adds up what was gathered: in bf16 such a sum would stand still."""
    count, prompt, own = 512, 3, 2
    torch.manual_seed(0)
    slots = torch.cat(
        [
            torch.cat([torch.arange(prompt), prompt + own * n + torch.arange(own)])
            for n in range(count)
        ]
    )
    home = torch.cat(
        [
            torch.arange(prompt),
            torch.cat([n * (prompt + own) + prompt + torch.arange(own) for n in range(count)]),
        ]
    )
    packing = Packing(slots, home, ((count, prompt + own, prompt + own),))
    total = prompt + own * count
    made = torch.randn(3, 1, 2, total, 8)
    rough = made.bfloat16().requires_grad_()
    exact = made.bfloat16().double().requires_grad_()
    towards = torch.rand(1, total, 2, 8).bfloat16()
    for row in (rough, exact):
        out, _ = attend(torch.nn.Identity(), row[0], row[1], row[2], None, packing)
        out.backward(towards.to(out.dtype))
    assert rough.grad is not None and exact.grad is not None
    values, expected = rough.grad[2, :, :, :prompt].double(), exact.grad[2, :, :, :prompt]
    torch.testing.assert_close(values, expected, rtol=0.01, atol=0.01)
