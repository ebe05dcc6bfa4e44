"""Annotated rollouts and labelled examples to training sequences, and these to updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ppo_dist.algo.kl import k1, penalised_rewards
from ppo_dist.algo.tensors import pad, whiten
from ppo_dist.config.algorithm import Algorithm
from ppo_dist.protocols import AdvantageEstimator
from ppo_dist.types import Annotation, Floats, LabelledExample, Scored, TrainSequence


def experience(
    scored: Sequence[Scored],
    annotations: Sequence[Annotation],
    estimator: AdvantageEstimator,
    algorithm: Algorithm,
) -> list[TrainSequence]:
    """Training sequences of a step's rollouts, advantages whitened over all of them at once."""
    if not scored:
        return []
    logprobs_BR, mask_BR = pad([a.logprobs_R for a in annotations])
    reference_BR, _ = pad([a.reference_R for a in annotations])
    values_BR, _ = pad([a.values_R for a in annotations])
    scores_B = torch.tensor([s.score.value for s in scored], dtype=torch.float64)
    rewards_BR = penalised_rewards(
        scores_B, k1(logprobs_BR, reference_BR), mask_BR, algorithm.kl_coef
    )
    cut_off = [s.rollout.finish == "length" and algorithm.bootstrap_truncated for s in scored]
    value_end_B = torch.tensor(
        [a.value_end * c for a, c in zip(annotations, cut_off, strict=True)], dtype=torch.float64
    )
    advantages_BR, returns_BR = estimator(rewards_BR, values_BR, mask_BR, value_end_B)
    if algorithm.whiten:
        advantages_BR = whiten(advantages_BR, mask_BR)
    return [
        _reinforced(s, a, advantages_BR[b], returns_BR[b])
        for b, (s, a) in enumerate(zip(scored, annotations, strict=True))
    ]


def _reinforced(
    scored: Scored, annotation: Annotation, advantages: torch.Tensor, returns: torch.Tensor
) -> TrainSequence:
    rollout = scored.rollout
    count = len(rollout.tokens_R)
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    return TrainSequence(
        uid=f"{rollout.prompt.uid}#{rollout.index}",
        tokens_T=np.concatenate([rollout.prompt.tokens_P, rollout.tokens_R]),
        prompt_tokens=len(rollout.prompt.tokens_P),
        policy_weight_R=ones,
        value_weight_R=ones,
        ce_weight_R=zeros,
        advantages_R=_row(advantages, count),
        returns_R=_row(returns, count),
        logprobs_R=annotation.logprobs_R,
        values_R=annotation.values_R,
    )


def _row(padded: torch.Tensor, count: int) -> Floats:
    return padded[:count].numpy().astype(np.float32)


def supervised(example: LabelledExample) -> TrainSequence:
    """The training sequence of a labelled example: cross-entropy on its response alone."""
    count = len(example.tokens_R)
    zeros = np.zeros(count, np.float32)
    return TrainSequence(
        uid=example.prompt.uid,
        tokens_T=np.concatenate([example.prompt.tokens_P, example.tokens_R]),
        prompt_tokens=len(example.prompt.tokens_P),
        policy_weight_R=zeros,
        value_weight_R=zeros,
        ce_weight_R=np.ones(count, np.float32),
        advantages_R=zeros,
        returns_R=zeros,
        logprobs_R=zeros,
        values_R=zeros,
    )


def updates(
    reinforced: Sequence[TrainSequence],
    take_labelled: Callable[[], list[LabelledExample]],
    algorithm: Algorithm,
    seed: int,
    step: int,
) -> list[list[TrainSequence]]:
    """The sequences of each update of a step: a part of the rollouts, newly shuffled each epoch,
    and labelled examples.

    There are epochs × minibatches of them, whatever the mix, so that runs with other mixes make as
    many updates. Responses to one prompt stay in one minibatch: the learner then computes their
    prompt once.
    """
    groups: dict[bytes, list[TrainSequence]] = {}
    for sequence in reinforced:
        prompt = sequence.tokens_T[: sequence.prompt_tokens].tobytes()
        groups.setdefault(prompt, []).append(sequence)
    by_prompt = list(groups.values())
    made = []
    for epoch in range(algorithm.epochs):
        order = np.random.default_rng([seed, step, epoch]).permutation(len(by_prompt))
        for part in np.array_split(order, algorithm.minibatches):
            rollouts = [sequence for g in part for sequence in by_prompt[g]]
            made.append(rollouts + [supervised(example) for example in take_labelled()])
    return made
