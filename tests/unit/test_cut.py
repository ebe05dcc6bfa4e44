"""However an update is cut, over ranks, micro-batches and rows, its gradient is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_dist.config import RunError
from ppo_dist.config.algorithm import Algorithm
from ppo_dist.data.batching import pack
from ppo_dist.learner import group
from ppo_dist.learner.group import Learners
from ppo_dist.learner.losses import Tensors, policy_loss, value_loss
from ppo_dist.learner.worker import Asked, LearnerWorker, UpdateShard
from ppo_dist.models.critic import CriticModel, load_critic
from ppo_dist.models.policy import PolicyModel, load_policy
from ppo_dist.reports import Coefficients, StepReport, TermSums, UpdateReport
from ppo_dist.types import Annotation, Prompt, Rollout, TrainSequence

COEFFICIENTS = Coefficients(
    policy=0.7, value=0.5, mu=0.3, kl=0.2, entropy=0.1, lr=0.1, critic_lr=0.1
)
SUPERVISED = replace(COEFFICIENTS, policy=0.0, kl=0.0, entropy=0.0)
ALGORITHM = Algorithm.model_validate({"kl": "loss"})
CPU = torch.device("cpu")


class PlainRanks:
    """Ranks without DeepSpeed: each adds its gradients to one policy and one critic."""

    def __init__(
        self, world: int, policy: PolicyModel, critic: CriticModel, coefficients: Coefficients
    ) -> None:
        self.world, self._policy, self._critic = world, policy, critic
        self._coefficients = coefficients
        self.micro_batches: list[tuple[int, int]] = []
        self.tokens = 0  # in all rows of the policy

    def call(self, method: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert method is LearnerWorker.update
        return [StepReport(tuple(map(self._update, shards))) for shards, _ in args]

    def _update(self, shard: UpdateShard) -> UpdateReport:
        sums = TermSums()
        self.micro_batches.append((len(shard.policy), len(shard.critic)))
        for sequences in shard.policy:
            batch = Tensors.of(pack(sequences), CPU)
            self.tokens += len(batch.tokens_S)
            out = self._policy(*batch.row, batch.targets_K, torch.ones(len(batch.targets_K)))
            loss, of_policy = policy_loss(batch, out, shard.counts, self._coefficients, ALGORITHM)
            loss.backward()
            sums += of_policy
        for sequences in shard.critic:
            batch = Tensors.of(pack(sequences), CPU)
            values_K = self._critic(*batch.row)
            loss, of_value = value_loss(
                batch, values_K, shard.counts, self._coefficients, ALGORITHM
            )
            loss.backward()
            sums += of_value
        return UpdateReport(shard.counts, sums, 1.0, 1.0)


@cache
def models(folder: str) -> tuple[PolicyModel, CriticModel]:
    policy = PolicyModel(load_policy(folder, torch.float64), logits_chunk=5)
    critic = load_critic(folder, torch.float64)
    torch.nn.init.normal_(critic.head.weight)
    return policy, critic


def gradient(
    folder: str,
    sequences: list[TrainSequence],
    world: int,
    budget: int,
    coefficients: Coefficients = COEFFICIENTS,
) -> tuple[list[torch.Tensor], TermSums]:
    policy, critic = models(folder)
    parameters = [*policy.parameters(), *critic.parameters()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    ranks = PlainRanks(world, policy, critic, coefficients)
    report = Learners(ranks, budget).update([sequences], coefficients)
    # ranks with another number of passes would wait for each other for ever
    assert len(set(ranks.micro_batches)) == 1
    return [p.grad.clone() for p in parameters if p.grad is not None], report.updates[0].sums


def made(prompt: int, length: int, kind: str, number: int) -> TrainSequence:
    """A sequence of one of a few prompts; `masked` has tokens whose weight is 0."""
    rng = np.random.default_rng(number)
    tokens = np.concatenate([np.arange(3, 4 + 2 * prompt), rng.integers(3, 18, length)])

    def numbers(scale: float) -> np.ndarray:
        return (scale * rng.normal(size=length)).astype(np.float32)

    live = np.ones(length, np.float32)
    if kind == "masked":
        live[rng.integers(0, 2, length) == 0] = 0.0
    zeros = np.zeros(length, np.float32)
    reinforced = kind != "labelled"
    return TrainSequence(
        uid=str(number),
        origin="verifiable",
        source="exact",
        tokens_T=tokens,
        prompt_tokens=len(tokens) - length,
        policy_weight_R=live if reinforced else zeros,
        value_weight_R=live if reinforced else zeros,
        ce_weight_R=zeros if reinforced else live,
        advantages_R=numbers(1.0),
        returns_R=numbers(1.0),
        logprobs_R=numbers(0.1) - 3,
        reference_R=numbers(0.1) - 3,
        values_R=numbers(1.0),
    )


sequences = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(1, 7), st.sampled_from(["plain", "masked", "labelled"])
    ),
    min_size=1,
    max_size=9,
).map(lambda shapes: [made(*shape, number) for number, shape in enumerate(shapes)])


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Llama norms in fp32 whatever the weights are."""
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequences, st.integers(1, 4), st.integers(1, 60), st.randoms())
def test_any_cut_gives_the_same_gradient(
    tiny_model: Path, work: list[TrainSequence], world: int, budget: int, random: Any
) -> None:
    """Few sequences over many ranks, so that some have nothing; budgets below one sequence; any
    order.
    """
    whole, sums = gradient(str(tiny_model), work, world=1, budget=10_000)
    shuffled = random.sample(work, len(work))
    cut, cut_sums = gradient(str(tiny_model), shuffled, world, budget)
    close(cut, whole)
    for name, value in vars(sums).items():
        assert vars(cut_sums)[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequences)
def test_more_unlabelled_tokens_leave_the_supervised_gradient_alone(
    tiny_model: Path, work: list[TrainSequence]
) -> None:
    """With policy, entropy and KL terms without weight, only the labelled part is left."""
    labelled = [s for s in work if s.ce_weight_R.any()]
    nothing = np.zeros(5, np.float32)
    silent = [
        replace(made(p, 5, "plain", 100 + p), advantages_R=nothing, value_weight_R=nothing)
        for p in range(3)
    ]
    alone, _ = gradient(str(tiny_model), labelled, 1, 10_000, SUPERVISED)
    among, _ = gradient(str(tiny_model), [*silent, *labelled], 2, 30, SUPERVISED)
    close(among, alone)


@pytest.mark.parametrize("world", [1, 2])
def test_what_teaches_nothing_is_not_computed_and_changes_nothing(
    tiny_model: Path, world: int
) -> None:
    """Responses without an advantage still count: the others weigh what they would among any."""
    work = [made(p, 5, "plain", p) for p in range(3)]
    idle = [
        replace(made(p, 5, "plain", 100 + p), advantages_R=np.zeros(5, np.float32))
        for p in range(4)
    ]
    work, idle = [[replace(s, value_weight_R=np.zeros(5)) for s in part] for part in (work, idle)]
    silent = replace(COEFFICIENTS, kl=0.0, entropy=0.0)
    nearly = replace(silent, entropy=1e-12)  # so all are computed

    def tokens(sequences: list[TrainSequence], coefficients: Coefficients) -> int:
        ranks = PlainRanks(world, *models(str(tiny_model)), coefficients)
        Learners(ranks, 10_000).update([sequences], coefficients)
        return ranks.tokens

    skipping, sums = gradient(str(tiny_model), [*idle, *work], world, 40, silent)
    computing, of_all = gradient(str(tiny_model), [*idle, *work], world, 40, nearly)
    close(skipping, computing)
    assert (sums.acted, of_all.acted) == (15, 35)
    assert tokens([*idle, *work], silent) == tokens(work, silent)
    assert tokens([*idle, *work], nearly) > tokens(work, nearly)
    none, _ = gradient(str(tiny_model), idle, world, 40, silent)  # and still is an update
    assert not any(p.any() for p in none) and tokens(idle, silent) > 0


def test_a_checkpoint_that_lacks_a_rank_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnDisksOfTheirOwn:
        world = 3

        def call(self, method: Any, args: Any) -> list[None]:
            (tmp_path / "random-1.safetensors").touch()
            return [None] * 3

    monkeypatch.setattr(group, "SEEN_WITHIN_S", 0.1)
    with pytest.raises(RunError, match="the files of 2 of 3 learners are not there"):
        Learners(OnDisksOfTheirOwn(), 100).save(checkpoint=tmp_path)
    for rank in (0, 2):
        (tmp_path / f"random-{rank}.safetensors").touch()
    Learners(OnDisksOfTheirOwn(), 100).save(checkpoint=tmp_path)


class Counting:
    """Ranks that annotate a token with itself, and remember how many each pass had."""

    world = 2

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []  # by rank and pass

    def call(self, method: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert method is LearnerWorker.annotate
        self.tokens = [[sum(len(a.tokens_T) for a in rows) for rows in shard] for shard, _ in args]
        return [[[self._echo(a) for a in rows] for rows in shard] for shard, _ in args]

    def _echo(self, asked: Asked) -> Annotation:
        own = asked.tokens_T[asked.prompt_tokens :].astype(np.float32)
        return Annotation(own, own, own, 0.0)


def responses(prompts: int, each: int) -> list[Rollout]:
    """Of 8 tokens each, all of one number, to prompts of 2."""
    asked = [Prompt(f"p:{n}", "verifiable", "", np.array([n, n])) for n in range(prompts)]
    nothing = np.zeros(8, np.float32)
    return [
        Rollout(asked[n // each], n % each, np.full(8, n), nothing, "", "eos", 0)
        for n in range(prompts * each)
    ]


@pytest.mark.parametrize(
    ("prompts", "passes"), [(32, [[80, 80], [80, 80]]), (40, [[70, 70, 60], [70, 70, 60]])]
)
def test_passes_without_gradients_are_of_four_micro_batches(
    prompts: int, passes: list[list[int]]
) -> None:
    ranks = Counting()
    answers = Learners(ranks, 20).annotate(responses(prompts, 1))
    assert [a.logprobs_R.tolist() for a in answers] == [[float(n)] * 8 for n in range(prompts)]
    assert ranks.tokens == passes


def test_many_responses_to_one_prompt_are_annotated_by_all_ranks() -> None:
    ranks = Counting()
    Learners(ranks, 50).annotate(responses(1, 12))
    assert ranks.tokens == [[60], [60]]
