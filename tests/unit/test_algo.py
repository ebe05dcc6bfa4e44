"""The formulas, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_dist.algo.advantages import Gae
from ppo_dist.algo.kl import k1, penalised_rewards
from ppo_dist.algo.losses import MAX_LOG_RATIO, policy_term, value_term
from ppo_dist.algo.tensors import pad, whiten


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def live(*rows: str) -> torch.Tensor:
    """A mask, drawn: x where a token counts."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


NO_END = torch.zeros(1, dtype=torch.float64)


def test_gae_by_hand() -> None:
    gae = Gae(gamma=0.5, lam=0.4)
    values = table([1.0, 2.0, 3.0])
    advantages, returns = gae(table([0.1, 0.2, 1.0]), values, live("xxx"), NO_END + 4.0)
    # deltas: .1 + .5*2 - 1 = .1, .2 + .5*3 - 2 = -.3, 1 + .5*4 - 3 = 0; factor .2
    close(advantages, table([0.1 + 0.2 * -0.3, -0.3, 0.0]))
    close(returns, table([1.04, 1.7, 3.0]))


def test_undiscounted_without_penalty_the_advantage_is_reward_less_value() -> None:
    values, mask = table([0.3, -0.2, 0.7], [0.5, 0.1, 9.0]), live("xxx", "xx.")
    rewards = penalised_rewards(table([2.0, -1.0])[0], torch.rand(2, 3).double(), mask, 0.0)
    advantages, returns = Gae(1.0, 1.0)(rewards, values, mask, NO_END.repeat(2))
    close(advantages, table([1.7, 2.2, 1.3], [-1.5, -1.1, 0.0]))
    close(returns, table([2.0, 2.0, 2.0], [-1.0, -1.0, 0.0]))


def test_lambda_zero_gives_the_deltas() -> None:
    rewards, values = table([0.5, 0.0, 1.0]), table([1.0, 2.0, 4.0])
    advantages, _ = Gae(0.9, 0.0)(rewards, values, live("xxx"), NO_END)
    close(advantages, table([0.5 + 1.8 - 1.0, 3.6 - 2.0, 1.0 - 4.0]))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_a_one_token_answer(lam: float) -> None:
    advantages, returns = Gae(0.9, lam)(table([1.0]), table([0.25]), live("x"), NO_END)
    close(advantages, table([0.75]))
    close(returns, table([1.0]))


def test_value_end_stands_for_the_rest_of_a_truncated_answer() -> None:
    rewards, values, mask = table([0.0, 0.0, 7.0]), table([1.0, 2.0, 7.0]), live("xx.")
    advantages, returns = Gae(1.0, 1.0)(rewards, values, mask, NO_END + 5.0)
    close(advantages, table([4.0, 3.0, 0.0]))
    close(returns, table([5.0, 5.0, 0.0]))


number = st.floats(-5, 5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(number, number), min_size=1, max_size=6),
    st.lists(st.integers(0, 6), max_size=5),
    number,
    st.sampled_from([math.nan, math.inf, 1e9]),
)
def test_masked_tokens_change_nothing(
    tokens: list[tuple[float, float]], gaps: list[int], end: float, junk: float
) -> None:
    """Whatever stands in them and wherever they are: before, between or after."""
    gae, end_B = Gae(0.97, 0.9), NO_END + end
    rewards, values = (table(list(column)) for column in zip(*tokens, strict=True))
    plain, plain_returns = gae(rewards, values, live("x" * len(tokens)), end_B)
    mixed, drawn = list(tokens), ["x"] * len(tokens)
    for gap in gaps:
        mixed.insert(gap, (junk, junk))
        drawn.insert(gap, ".")
    mask = live("".join(drawn))
    with_junk = (table(list(column)) for column in zip(*mixed, strict=True))
    advantages, returns = gae(*with_junk, mask, end_B)
    close(advantages[mask], plain[0])
    close(returns[mask], plain_returns[0])
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()


def test_the_side_of_the_padding_does_not_matter() -> None:
    gae, end = Gae(0.9, 0.8), NO_END + 0.5
    right = gae(table([1, 2, 3, 0, 0]), table([4, 5, 6, 0, 0]), live("xxx.."), end)
    left = gae(table([0, 0, 1, 2, 3]), table([0, 0, 4, 5, 6]), live("..xxx"), end)
    for r, lt in zip(right, left, strict=True):
        close(r[:, :3], lt[:, 2:])
        assert r[0, 0] != 0


def test_k1_and_penalised_rewards() -> None:
    kl = k1(table([-1.0, -2.0, -3.0, -1.0]), table([-1.5, -1.0, -3.0, -9.0]))
    close(kl, table([0.5, -1.0, 0.0, 8.0]))
    rewards = penalised_rewards(
        table([10.0, 20.0, 30.0])[0], kl.repeat(3, 1), live("xxx.", "x.x.", "...."), 0.1
    )
    close(rewards, table([-0.05, 0.1, 10, 0], [-0.05, 0, 20, 0], [0, 0, 0, 0]))


def test_a_penalty_on_the_last_token_adds_to_the_score() -> None:
    rewards = penalised_rewards(table([1.0])[0], table([0.5, 2.0]), live("xx"), 0.25)
    close(rewards, table([-0.125, 0.5]))


def test_whiten_gives_mean_zero_and_unbiased_variance_one() -> None:
    values = table([1.0, 2.0, 99.0], [3.0, 6.0, -7.0])
    mask = live("xx.", "xx.")
    whitened = whiten(values, mask)
    flat = whitened[mask]
    # mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
    close(flat, table([-2.0, -1.0, 0.0, 3.0])[0] / math.sqrt(14 / 3))
    assert flat.mean().item() == pytest.approx(0, abs=1e-12)
    assert flat.var(unbiased=True).item() == pytest.approx(1)
    assert whitened[~mask].tolist() == [99.0, -7.0]


@pytest.mark.parametrize(("row", "drawn"), [([3.0, 8.0], "x."), ([2.0, 2.0], "xx"), ([1, 2], "..")])
def test_whiten_leaves_alone_what_has_no_spread(row: list[float], drawn: str) -> None:
    assert whiten(table(row), live(drawn)).tolist() == [row]


def test_policy_term_where_nothing_has_changed() -> None:
    """At ratio 1 the loss is −A, nothing is clipped, and the gradient is that of REINFORCE."""
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    chosen = torch.tensor([0, 3, 6, 2, 2])
    advantages = table([1.0, -2.0, 0.0, 0.5, -0.1])[0]
    logprobs = logits.log_softmax(-1)[torch.arange(5), chosen]
    term = policy_term(logprobs, logprobs.detach(), advantages, clip=0.2)
    close(term.loss.detach(), -advantages)
    assert term.clipped.tolist() == [0.0] * 5
    assert term.kl.tolist() == [0.0] * 5
    (got,) = torch.autograd.grad(term.loss.sum(), logits)
    probabilities = logits.detach().softmax(-1)
    wanted = -advantages[:, None] * (torch.eye(7, dtype=torch.float64)[chosen] - probabilities)
    close(got, wanted)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.5, 2.0, -2.4, 1.0, 0.0),  # better than before, and far enough
        (0.5, 2.0, -1.0, 0.0, -1.0),  # a good token lost: pull it back
        (1.5, -2.0, 3.0, 0.0, 3.0),  # a bad token gained: push it down
        (0.5, -2.0, 1.6, 1.0, 0.0),  # worse than before, and far enough
        (1.1, 2.0, -2.2, 0.0, -2.2),
        (0.9, -2.0, 1.8, 0.0, 1.8),
    ],
)
def test_clipping(
    ratio: float, advantage: float, loss: float, clipped: float, slope: float
) -> None:
    new = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    term = policy_term(new, new.new_tensor([-1.0]), new.new_tensor([advantage]), clip=0.2)
    term.loss.sum().backward()
    assert term.loss.item() == pytest.approx(loss)
    assert term.clipped.item() == clipped
    assert term.kl.item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_wild_token_stays_finite(gap: float, advantage: float) -> None:
    new = torch.tensor([gap], requires_grad=True)
    term = policy_term(new, torch.zeros(1), torch.tensor([advantage]), clip=0.2)
    term.loss.sum().backward()
    assert new.grad is not None
    assert all(torch.isfinite(t).all() for t in (*term, new.grad))
    if gap > 0 > advantage:
        assert term.loss.item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped", "slope"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.81, 0.0, -0.9),  # within the clip
        (1.5, 1.0, 2.0, 0.5 * 0.64, 1.0, 0.0),  # moved past the clip towards the target
        (1.5, 1.0, 0.0, 0.5 * 2.25, 0.0, 1.5),  # moved away from it: no mercy
        (0.5, 1.0, 0.0, 0.5 * 0.64, 1.0, 0.0),
        (3.0, 1.0, 3.0, 0.5 * 3.24, 1.0, 0.0),  # right, but too fast
    ],
)
def test_value_term(
    value: float, old: float, target: float, loss: float, clipped: float, slope: float
) -> None:
    new = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    term = value_term(new, new.new_tensor([old]), new.new_tensor([target]), clip=0.2)
    term.loss.sum().backward()
    assert term.loss.item() == pytest.approx(loss)
    assert term.clipped.item() == clipped
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope, abs=1e-12)


def test_pad() -> None:
    values, mask = pad([np.array([1, 2], np.float32), np.array([], np.float32), np.ones(3, "f4")])
    assert values.tolist() == [[1, 2, 0], [0, 0, 0], [1, 1, 1]]
    assert torch.equal(mask, live("xx.", "...", "xxx"))
    assert values.dtype == torch.float64
    assert pad([])[0].shape == (0, 0)
