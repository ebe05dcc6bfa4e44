"""Causal attention as plain products against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ppo_dist import device
from ppo_dist.models.attention import by_products, causal

SHAPES = [(2, 6, 2, 7, 4), (1, 3, 3, 1, 2), (3, 4, 1, 5, 8)]  # rows, heads, of keys, tokens, size


def tables(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rows, heads, shared, tokens, size = shape
    return [
        torch.randn(rows, tokens, h, size, dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (heads, shared, shared)
    ]


def by_torch(*qkv: torch.Tensor, scale: float | None) -> torch.Tensor:
    query, key, value = qkv
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_give_the_same_and_the_same_gradients(
    shape: tuple[int, int, int, int, int], scale: float | None
) -> None:
    own, theirs = tables(shape), tables(shape)
    out = by_products(own[0], own[1], own[2], scale)
    expected = by_torch(*theirs, scale=scale)
    torch.testing.assert_close(out, expected)
    towards = torch.randn_like(expected)
    out.backward(towards)
    expected.backward(towards)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_token_sees_a_later_one() -> None:
    query, key, value = tables(SHAPES[0])
    before = by_products(query, key, value, None)
    with torch.no_grad():
        for table in (query, key, value):
            table[:, :, 4:] += 1.0
    after = by_products(query, key, value, None)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.isclose(before[:, :, 4:], after[:, :, 4:]).all()


@pytest.mark.parametrize(("tokens", "kind"), [(500, None), (501, torch.float32)])
def test_short_sequences_are_products_on_a_cpu_in_bf16(
    tokens: int, kind: torch.dtype | None
) -> None:
    table = torch.empty(1, 1, tokens, 4, dtype=torch.bfloat16)
    assert device.attention_dtype(table) == kind
    assert device.attention_dtype(table.float()) == torch.float32
    assert device.attention_dtype(table.to("meta")) == torch.bfloat16


def test_both_ways_are_near_to_what_fp64_gives() -> None:
    for tokens in (60, 520):
        exact = tables((2, 6, 2, tokens, 64))
        rough = [table.detach().bfloat16() for table in exact]
        out = causal(rough[0], rough[1], rough[2], None)
        expected = by_torch(*(table.double() for table in rough), scale=None)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.02)
