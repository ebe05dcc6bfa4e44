"""The head's own backward pass against what autograd makes of the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppo_dist.models.head import Head
from ppo_dist.models.policy import ValueHead

K, H, V = 7, 4, 11


def plain(
    linear: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table = (linear(hidden) / temperature[:, None]).log_softmax(-1)
    likeliest = (table.argmax(-1) == targets).double()
    return table[torch.arange(K), targets], -(table.exp() * table).sum(-1), likeliest


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients(bias: bool, chunk: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(H, V, bias=bias, dtype=torch.float64)
    hidden = torch.randn(K, H, dtype=torch.float64, requires_grad=True)
    targets, temperature = torch.randint(V, (K,)), torch.linspace(0.5, 2, K)
    leaves = [hidden, *linear.parameters()]
    weights = torch.randn(2, K, dtype=torch.float64)
    gradients = []
    for out in (
        Head(linear, chunk)(hidden, targets, temperature),
        plain(linear, hidden, targets, temperature),
    ):
        loss = (out[0] * weights[0]).sum() + (out[1] * weights[1]).sum()
        gradients.append([*out, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_frozen_weights_get_no_gradient() -> None:
    linear = nn.Linear(H, V)
    linear.requires_grad_(False)
    hidden = torch.randn(K, H, requires_grad=True)
    Head(linear, 3)(hidden, torch.zeros(K, dtype=torch.long), torch.ones(K))[0].sum().backward()
    assert linear.weight.grad is None
    assert hidden.grad is not None


def test_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential"):
        Head(nn.Sequential(nn.Linear(H, V)), 3)


def test_values_are_finer_than_the_trunk() -> None:
    """Else GAE's differences from token to token would be those of rounding."""
    head = ValueHead(64, 1, bias=False, dtype=torch.bfloat16)
    hidden_KH = torch.randn(5, 64).to(torch.bfloat16)
    values_K = head(hidden_KH)
    exact_K = hidden_KH.double() @ head.weight.double()[0]
    assert values_K.dtype == torch.float32
    assert torch.allclose(values_K.double(), exact_K, atol=1e-6, rtol=1e-6)
