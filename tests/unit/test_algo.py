"""The formulas, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_dist.algo.advantages import Gae, GroupMean, ReinforcePlusPlus, Rloo
from ppo_dist.algo.kl import ESTIMATORS, MAX_LOG_RATIO, KlController, k1, k2, k3
from ppo_dist.algo.losses import policy_term, supervised_term, value_term
from ppo_dist.algo.preferences import (
    last_token_scores,
    preference_accuracy,
    preference_loss,
)
from ppo_dist.algo.rewards import RunningScale, penalised_rewards
from ppo_dist.algo.tensors import blocks, pad, whiten
from ppo_dist.config.algorithm import AdaptiveKl, Clip, FixedKl


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def live(*rows: str) -> torch.Tensor:
    """A mask, drawn: x where a token counts."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


NO_END = torch.zeros(1, dtype=torch.float64)
ONE = torch.zeros(1, dtype=torch.long)  # all rows respond to one prompt
CLIP = Clip(low=0.2, high=0.2)


def test_gae_by_hand() -> None:
    gae = Gae(gamma=0.5, lam=0.4)
    values = table([1.0, 2.0, 3.0])
    advantages, returns = gae(table([0.1, 0.2, 1.0]), values, live("xxx"), NO_END + 4.0, ONE)
    # deltas: .1 + .5*2 - 1 = .1, .2 + .5*3 - 2 = -.3, 1 + .5*4 - 3 = 0; factor .2
    close(advantages, table([0.1 + 0.2 * -0.3, -0.3, 0.0]))
    close(returns, table([1.04, 1.7, 3.0]))


def test_undiscounted_without_penalty_the_advantage_is_reward_less_value() -> None:
    values, mask = table([0.3, -0.2, 0.7], [0.5, 0.1, 9.0]), live("xxx", "xx.")
    rewards = penalised_rewards(table([2.0, -1.0])[0], torch.rand(2, 3).double(), mask, 0.0)
    advantages, returns = Gae(1.0, 1.0)(rewards, values, mask, NO_END.repeat(2), ONE)
    close(advantages, table([1.7, 2.2, 1.3], [-1.5, -1.1, 0.0]))
    close(returns, table([2.0, 2.0, 2.0], [-1.0, -1.0, 0.0]))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9, 12, 50])
def test_gae_of_any_length_is_its_recursion(width: int) -> None:
    drawn = torch.Generator().manual_seed(width)
    rewards, values = torch.randn(2, 5, width, dtype=torch.float64, generator=drawn)
    ends = torch.randn(5, dtype=torch.float64, generator=drawn)
    mask = torch.rand(5, width, generator=drawn) < 0.8
    advantages, _ = Gae(0.9, 0.8)(rewards, values, mask, ends, ONE.repeat(5))
    wanted = torch.zeros_like(rewards)
    for b in range(5):
        later, value = 0.0, float(ends[b])
        for t in reversed(torch.nonzero(mask[b]).flatten().tolist()):
            later = float(rewards[b, t] + 0.9 * value - values[b, t]) + 0.9 * 0.8 * later
            wanted[b, t], value = later, float(values[b, t])
    close(advantages, wanted)


def test_lambda_zero_gives_the_deltas() -> None:
    rewards, values = table([0.5, 0.0, 1.0]), table([1.0, 2.0, 4.0])
    advantages, _ = Gae(0.9, 0.0)(rewards, values, live("xxx"), NO_END, ONE)
    close(advantages, table([0.5 + 1.8 - 1.0, 3.6 - 2.0, 1.0 - 4.0]))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_a_one_token_answer(lam: float) -> None:
    advantages, returns = Gae(0.9, lam)(table([1.0]), table([0.25]), live("x"), NO_END, ONE)
    close(advantages, table([0.75]))
    close(returns, table([1.0]))


def test_value_end_stands_for_the_rest_of_a_truncated_answer() -> None:
    rewards, values, mask = table([0.0, 0.0, 7.0]), table([1.0, 2.0, 7.0]), live("xx.")
    advantages, returns = Gae(1.0, 1.0)(rewards, values, mask, NO_END + 5.0, ONE)
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
    plain, plain_returns = gae(rewards, values, live("x" * len(tokens)), end_B, ONE)
    mixed, drawn = list(tokens), ["x"] * len(tokens)
    for gap in gaps:
        mixed.insert(gap, (junk, junk))
        drawn.insert(gap, ".")
    mask = live("".join(drawn))
    with_junk = (table(list(column)) for column in zip(*mixed, strict=True))
    advantages, returns = gae(*with_junk, mask, end_B, ONE)
    close(advantages[mask], plain[0])
    close(returns[mask], plain_returns[0])
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()


def test_the_side_of_the_padding_does_not_matter() -> None:
    gae, end = Gae(0.9, 0.8), NO_END + 0.5
    right = gae(table([1, 2, 3, 0, 0]), table([4, 5, 6, 0, 0]), live("xxx.."), end, ONE)
    left = gae(table([0, 0, 1, 2, 3]), table([0, 0, 4, 5, 6]), live("..xxx"), end, ONE)
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


def test_a_score_that_is_not_finite_stays_at_one_token() -> None:
    rewards = penalised_rewards(table([math.inf])[0], table([0.5, 2.0]), live("xx"), 0.0)
    assert rewards.tolist() == [[0.0, math.inf]]


def test_responses_without_tokens_have_no_rewards() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.float64)
    assert penalised_rewards(table([1.0, 2.0])[0], nothing, nothing.bool(), 0.1).shape == (2, 0)


def test_whiten_gives_mean_zero_and_unbiased_variance_one_over_all_rows() -> None:
    rows = whiten([table([1.0, 2.0, 3.0])[0], table([6.0])[0]])
    flat = torch.cat(rows)
    # mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
    close(flat, table([-2.0, -1.0, 0.0, 3.0])[0] / math.sqrt(14 / 3))
    assert flat.mean().item() == pytest.approx(0, abs=1e-12)
    assert flat.var(unbiased=True).item() == pytest.approx(1)
    assert [len(row) for row in rows] == [3, 1]


@pytest.mark.parametrize("row", [[3.0], []])
def test_whiten_leaves_a_single_value_alone(row: list[float]) -> None:
    assert [w.tolist() for w in whiten([table(row)[0], table([])[0]])] == [row, []]


def test_whitened_without_spread_is_nothing() -> None:
    """Where all responses are equally good there is nothing to learn."""
    assert [w.tolist() for w in whiten([table([2.0])[0], table([2.0])[0]])] == [[0.0], [0.0]]


@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    limit=st.integers(1, 60),
    data=st.data(),
)
def test_blocks_hold_every_row_once_groups_whole_tables_small(
    groups: list[int], limit: int, data: st.DataObject
) -> None:
    lengths = [data.draw(st.integers(0, 9)) for _ in groups]
    parts = blocks(groups, lengths, limit)
    assert sorted(b for part in parts for b in part) == list(range(len(groups)))
    of_part = [{groups[b] for b in part} for part in parts]
    assert sum(map(len, of_part)) == len(set(groups))
    for part, names in zip(parts, of_part, strict=True):
        assert len(names) == 1 or len(part) * max(lengths[b] for b in part) <= limit


def test_policy_term_where_nothing_has_changed() -> None:
    """At ratio 1 the loss is −A, nothing is clipped, and the gradient is that of REINFORCE."""
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    chosen = torch.tensor([0, 3, 6, 2, 2])
    advantages = table([1.0, -2.0, 0.0, 0.5, -0.1])[0]
    logprobs = logits.log_softmax(-1)[torch.arange(5), chosen]
    term = policy_term(logprobs, logprobs.detach(), advantages, CLIP)
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
    term = policy_term(new, new.new_tensor([-1.0]), new.new_tensor([advantage]), CLIP)
    term.loss.sum().backward()
    assert term.loss.item() == pytest.approx(loss)
    assert term.clipped.item() == clipped
    assert term.kl.item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert term.kl_k1.item() == pytest.approx(-math.log(ratio))
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_wild_token_stays_finite(gap: float, advantage: float) -> None:
    new = torch.tensor([gap], requires_grad=True)
    term = policy_term(new, torch.zeros(1), torch.tensor([advantage]), CLIP)
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


# ── estimators without a critic ───────────────────────────────────────────────────────────────────

JUNK = math.nan


def estimated(estimator: Any, rewards: torch.Tensor, mask: torch.Tensor, *groups: int) -> list:
    values = torch.full_like(rewards, JUNK)
    end_B = rewards.new_zeros(len(rewards))
    advantages, _ = estimator(rewards, values, mask, end_B, torch.tensor(groups))
    return advantages.tolist()


REWARDS = table([0.0, 1.0, JUNK], [0.5, 2.5, JUNK], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0])
MASK = live("xx.", "xx.", "xxx", "xxx")  # sums 1, 3 in group 7, 5 alone in group 2, 3 alone in 4


def test_group_mean() -> None:
    got = estimated(GroupMean(std=False), REWARDS, MASK, 7, 7, 2, 4)
    assert got == [[-1, -1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    deviation = math.sqrt(2)  # unbiased, of 1 and 3
    got = estimated(GroupMean(std=True), REWARDS, MASK, 7, 7, 2, 4)
    assert got[0] == pytest.approx([-1 / deviation, -1 / deviation, 0], rel=1e-5)
    assert got[1][0] == -got[0][0] and not any(got[2]) and not any(got[3])


def test_equal_rewards_of_a_group_teach_nothing() -> None:
    same = table([1.0], [1.0], [1.0])
    for estimator in (GroupMean(True), GroupMean(False), Rloo()):
        assert estimated(estimator, same, live("x", "x", "x"), 1, 1, 1) == [[0.0]] * 3


def test_rloo_compares_with_the_others() -> None:
    rewards = table([1.0], [4.0], [10.0], [5.0])
    got = estimated(Rloo(), rewards, live("x", "x", "x", "x"), 0, 0, 0, 9)
    assert got == [[1 - 7.0], [4 - 5.5], [10 - 2.5], [0.0]]


def test_rloo_is_group_mean_scaled() -> None:
    rewards = torch.randn(6, 4, dtype=torch.float64)
    mask, groups = live(*["xxxx"] * 6), (0, 1, 0, 1, 0, 0)
    size = table([4.0, 2, 4, 2, 4, 4])[0][:, None]
    mean = table(*estimated(GroupMean(False), rewards, mask, *groups))
    close(table(*estimated(Rloo(), rewards, mask, *groups)), mean * size / (size - 1))


def test_reinforce_plus_plus_counts_what_is_to_come() -> None:
    rewards, mask = table([1.0, JUNK, 2.0, 4.0]), live("x.xx")
    assert estimated(ReinforcePlusPlus(0.5), rewards, mask, 0) == [[1 + 1 + 1, 0, 2 + 2, 4]]


# ── KL ────────────────────────────────────────────────────────────────────────────────────────────


def test_kl_estimators_by_hand() -> None:
    new, reference = table([-1.0, -3.0]), table([-2.0, -1.0])  # d = 1, −2
    close(k1(new, reference), table([1.0, -2.0]))
    close(k2(new, reference), table([0.5, 2.0]))
    close(k3(new, reference), table([math.exp(-1), math.exp(2) - 3]))


def test_kl_estimators_estimate_and_which_gradient_is_right() -> None:
    """Over a categorical distribution of six, expectations are sums: no sampling noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(-1)

    def expectation(terms: torch.Tensor) -> torch.Tensor:
        return (logits.softmax(-1).detach() * terms).sum()

    table_ = logits.log_softmax(-1)
    kl = (table_.exp() * (table_ - reference)).sum()
    (true,) = torch.autograd.grad(kl, logits, retain_graph=True)
    error = {}
    for name, estimate in ESTIMATORS.items():
        mean = expectation(estimate(table_, reference))
        (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
        error[name] = float((gradient - true).norm() / true.norm())
        if name != "k2":
            assert mean.item() == pytest.approx(kl.item())
    assert error["k1"] == pytest.approx(1)  # no gradient at all
    assert error["k2"] < 1e-12
    assert error["k3"] > 0.1
    # a step down k2 brings the policy nearer to the reference
    step = expectation(k2(table_, reference))
    (gradient,) = torch.autograd.grad(step, logits)
    nearer = (logits - 0.01 * gradient).detach().log_softmax(-1)
    assert (nearer.exp() * (nearer - reference)).sum() < kl


@pytest.mark.parametrize("gap", [5.0, -5.0, 100.0])
def test_k3_never_loses_its_gradient(gap: float) -> None:
    new = torch.tensor([-gap], requires_grad=True)
    k3(new, torch.zeros(1)).sum().backward()
    assert new.grad is not None and torch.isfinite(new.grad).all() and new.grad.abs() > 0.5


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)]
)
def test_the_adaptive_controller(kl: float, factor: float) -> None:
    controller = KlController(0.5, AdaptiveKl(kind="adaptive", target=6.0, horizon=1000))
    controller.observe(kl, responses=250)
    assert controller.coef == pytest.approx(0.5 * (1 + factor * 0.25))
    resumed = KlController(9.0, AdaptiveKl(kind="adaptive", target=6.0, horizon=1000))
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == controller.coef


def test_a_horizon_shorter_than_a_step_never_turns_the_penalty_round() -> None:
    controller = KlController(0.5, AdaptiveKl(kind="adaptive", target=6.0, horizon=100))
    controller.observe(0.0, responses=512)
    assert controller.coef == 0.25


def test_the_fixed_controller_is_what_the_config_says() -> None:
    controller = KlController(0.5, FixedKl())
    controller.observe(100.0, 10)
    assert controller.coef == 0.5
    controller.load_state_dict({"coef": 3.0})
    assert controller.coef == 0.5


# ── bounds, scales ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.25, 2.0, -2.5, 0.0),  # between the two bounds
        (1.5, 2.0, -2.6, 1.0),
        (0.7, -2.0, 1.6, 1.0),  # 0.8 is the lower bound
        (0.85, -2.0, 1.7, 0.0),
        (2.0, -2.0, 4.0, 0.0),
        (9.0, -2.0, 6.0, 1.0),  # the dual bound: 3·2
        (9.0, 2.0, -2.6, 1.0),  # not for positive advantages
    ],
)
def test_bounds_of_their_own_and_the_dual_one(
    ratio: float, advantage: float, loss: float, clipped: float
) -> None:
    new = torch.tensor([math.log(ratio)], dtype=torch.float64)
    bounds = Clip(low=0.2, high=0.3, dual=3.0)
    term = policy_term(new, torch.zeros(1), torch.tensor([advantage]), bounds)
    assert term.loss.item() == pytest.approx(loss)
    assert term.clipped.item() == clipped


def test_values_may_go_unclipped() -> None:
    term = value_term(table([5.0]), table([1.0]), table([2.0]), clip=None)
    assert (term.loss.item(), term.clipped.item()) == (4.5, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(number, min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_running_scale_is_that_of_everything_seen(chunks: list[list[float]]) -> None:
    scale, every = RunningScale(), [x for chunk in chunks for x in chunk]
    for chunk in chunks:
        scale.observe(table(chunk)[0])
    deviation = float(np.std(every, ddof=1)) if len(every) > 1 else 0.0
    expected = deviation if deviation > 1e-6 else scale.deviation
    assert scale.deviation == pytest.approx(expected, rel=1e-6)
    assert scale.mean == pytest.approx(float(np.mean(every)), abs=1e-9)
    resumed = RunningScale()
    resumed.load_state_dict(scale.state_dict())
    assert resumed.deviation == scale.deviation


def test_the_running_scale_of_nothing_is_one() -> None:
    scale = RunningScale()
    scale.observe(torch.zeros(0))
    assert scale.deviation == 1.0
    scale.observe(table([2.0, 2.0])[0])
    assert scale.deviation == 1.0


# ── preferences ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("p", [0.01, 0.5, 0.99])
def test_phi_weighs_by_p_times_one_minus_p_without_a_gradient_of_its_own(p: float) -> None:
    logprobs = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    plain, phi = supervised_term(logprobs, "nll"), supervised_term(logprobs, "phi")
    assert plain.loss.tolist() == plain.nll.tolist() == phi.nll.tolist() == [-math.log(p)]
    assert phi.loss.item() == pytest.approx(-p * (1 - p) * math.log(p))
    (gradient,) = torch.autograd.grad(phi.loss.sum(), logprobs)
    assert gradient.item() == pytest.approx(-p * (1 - p))


def test_preferences_by_hand() -> None:
    chosen, rejected = table([2.0, 0.0, -1.0])[0], table([0.0, 0.0, 1.0])[0]
    expected = [math.log(1 + math.exp(-d)) for d in (2.0, 0.0, -2.0)]
    assert preference_loss(chosen, rejected).tolist() == pytest.approx(expected)
    shifted = preference_loss(chosen, rejected, 0.5).tolist()
    assert shifted == pytest.approx([math.log(1 + math.exp(0.5 - d)) for d in (2.0, 0.0, -2.0)])
    assert preference_accuracy(chosen, rejected).tolist() == [1.0, 0.5, 0.0]


def test_a_score_is_read_at_the_last_token_wherever_the_padding_is() -> None:
    scores = table([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0])
    assert last_token_scores(scores, live("xx.", ".xx", "x..")).tolist() == [2.0, 6.0, 7.0]
    with pytest.raises(ValueError, match="without tokens"):
        last_token_scores(scores, live("xx.", "...", "x.."))


def test_nothing_within_the_bounds_counts_as_clipped() -> None:
    """Not even by rounding: in fp32, V_old + (V − V_old) is often not V."""
    generator = torch.Generator().manual_seed(0)
    old, noise, returns = torch.randn(3, 10_000, generator=generator)
    term = value_term(old + 0.1 * noise.clamp(-1, 1), old, returns, clip=0.2)
    assert not term.clipped.any()
