"""Annotated rollouts and labelled examples to training sequences, and these to updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ppo_dist.algo.kl import ESTIMATORS, KlController, k1
from ppo_dist.algo.losses import correction
from ppo_dist.algo.rewards import RunningScale, penalised_rewards
from ppo_dist.algo.tensors import blocks, pad, whiten
from ppo_dist.config.algorithm import Algorithm, KlInReward, Penalise
from ppo_dist.protocols import AdvantageEstimator
from ppo_dist.tracking.metrics import Row
from ppo_dist.types import Annotation, Floats, LabelledExample, Scored, TrainSequence

TABLE = 1 << 20
"""Entries of a padded table at most (8 MB), as long as a prompt's responses fit: a step's memory
does not grow with its padding, and the C library uses what is this small again.
"""


@dataclass(frozen=True)
class Shaped:
    """The scores of a step as rewards are made of them; `live_B` says which responses teach."""

    scores_B: torch.Tensor
    live_B: torch.Tensor
    cut_off_B: torch.Tensor


@dataclass
class Earned:
    """Advantages and returns, a row for each response; `kl` sums log π − log π_ref over all."""

    advantages: list[torch.Tensor]
    returns: list[Floats]
    kl: float = 0.0


class Experience:
    """Turns annotated rollouts into training sequences; remembers the KL coefficient and the scale
    of the scores.
    """

    def __init__(
        self, algorithm: Algorithm, estimator: AdvantageEstimator, corrects: bool = False
    ) -> None:
        """With `corrects` tokens weigh by π_old / π_behaviour."""
        self._algorithm, self._estimator, self._corrects = algorithm, estimator, corrects
        self._kl = KlController(algorithm.kl.coef, algorithm.kl.controller)
        self._scale = RunningScale()
        self.metrics: Row = {}

    @property
    def kl_coef(self) -> float:
        """β of the step to come."""
        return self._kl.coef

    def __call__(
        self, scored: Sequence[Scored], annotations: Sequence[Annotation], teaches_policy: bool
    ) -> list[TrainSequence]:
        """Training sequences of a step's rollouts, advantages whitened over all of them at once.
        Without `teaches_policy` only the critic learns. `metrics` then tells of this step.
        """
        self.metrics = {"objective/kl_coef": self._kl.coef}
        if not scored:
            return []
        algorithm, shaped = self._algorithm, self._shaped(scored)
        earned = self._earned(scored, annotations, shaped)
        advantages = self._whitened(scored, earned.advantages, shaped.live_B)
        self._kl.observe(earned.kl / len(scored), len(scored))
        weights = shaped.live_B.float().numpy()
        corrections = self._corrections(scored, annotations)
        return [
            _reinforced(
                s,
                a,
                advantages[b],
                earned.returns[b],
                policy_weight=corrections[b] * (weights[b] * teaches_policy),
                value_weight=weights[b] * algorithm.has_critic,
            )
            for b, (s, a) in enumerate(zip(scored, annotations, strict=True))
        ]

    def _earned(
        self, scored: Sequence[Scored], annotations: Sequence[Annotation], shaped: Shaped
    ) -> Earned:
        """What the estimator makes of the scores, block by block of whole groups."""
        kl, bootstraps = self._algorithm.kl, self._algorithm.truncated.kind == "bootstrap"
        coef = self._kl.coef if isinstance(kl, KlInReward) else 0.0
        group_B = _numbered([s.rollout.prompt.uid for s in scored])
        lengths_B = [len(a.logprobs_R) for a in annotations]
        nothing = np.zeros(0, np.float32)
        earned = Earned([torch.from_numpy(nothing)] * len(scored), [nothing] * len(scored))
        for part in blocks(group_B.tolist(), lengths_B, TABLE):
            own = [annotations[b] for b in part]
            logprobs_BR, mask_BR = pad([a.logprobs_R for a in own])
            reference_BR, _ = pad([a.reference_R for a in own])
            values_BR, _ = pad([a.values_R for a in own])
            ends_B = torch.tensor([a.value_end for a in own], dtype=torch.float64)
            estimate_BR = ESTIMATORS[kl.estimator](logprobs_BR, reference_BR)
            advantages_BR, returns_BR = self._estimator(
                penalised_rewards(shaped.scores_B[part], estimate_BR, mask_BR, coef),
                values_BR,
                mask_BR,
                torch.where(shaped.cut_off_B[part] & bootstraps, ends_B, 0.0),
                group_B[part],
            )
            earned.kl += float(k1(logprobs_BR, reference_BR).sum())
            for b, advantages_R, returns_R in zip(part, advantages_BR, returns_BR, strict=True):
                earned.advantages[b] = advantages_R[: lengths_B[b]]
                earned.returns[b] = returns_R[: lengths_B[b]].numpy().astype(np.float32)
        return earned

    def _whitened(
        self, scored: Sequence[Scored], advantages: Sequence[torch.Tensor], live_B: torch.Tensor
    ) -> list[torch.Tensor]:
        """The advantages, those that teach whitened together or by origin, as the config says."""
        how, made = self._algorithm.advantage.whiten, list(advantages)
        together: dict[str, list[int]] = {}
        for b, s in enumerate(scored):
            if live_B[b] and how != "off":
                key = s.rollout.prompt.origin if how == "per_origin" else "all"
                together.setdefault(key, []).append(b)
        for part in together.values():
            for b, row in zip(part, whiten([advantages[b] for b in part]), strict=True):
                made[b] = row
        return made

    def _corrections(
        self, scored: Sequence[Scored], annotations: Sequence[Annotation]
    ) -> Sequence[Floats | float]:
        """The weight of each token's policy term; 1 for all without correction."""
        if not self._corrects:
            return [1.0] * len(scored)
        cap, over = self._algorithm.correction.cap, self._algorithm.correction.over
        rows = [
            (torch.tensor(a.logprobs_R), torch.tensor(s.rollout.logprobs_R))
            for s, a in zip(scored, annotations, strict=True)
        ]
        weights = [correction(*row, cap, over) for row in rows]
        every = torch.cat(weights)
        self.metrics["policy/correction_mean"] = float(every.mean())
        self.metrics["policy/correction_cut_rate"] = float(every.eq(cap or math.inf).float().mean())
        return [w.numpy() for w in weights]

    def _shaped(self, scored: Sequence[Scored]) -> Shaped:
        shaping, truncated = self._algorithm.reward, self._algorithm.truncated
        scores_B = torch.tensor([s.score.value for s in scored], dtype=torch.float64)
        cut_off_B = torch.tensor([s.rollout.finish == "length" for s in scored])
        if shaping.normalise:
            self._scale.observe(scores_B)
            scores_B = scores_B / self._scale.deviation
            self.metrics["reward/scale"] = self._scale.deviation
        if shaping.clip is not None:
            self.metrics["reward/clipped_rate"] = float(
                (scores_B.abs() > shaping.clip).double().mean()
            )
            scores_B = scores_B.clamp(-shaping.clip, shaping.clip)
        if isinstance(truncated, Penalise):
            scores_B = scores_B - truncated.by * cut_off_B
        masks = truncated.kind == "mask"
        live_B = ~cut_off_B if masks else torch.ones_like(cut_off_B)
        return Shaped(scores_B, live_B, cut_off_B)

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient and the statistics of the scores."""
        return {"kl": self._kl.state_dict(), "scale": self._scale.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        self._kl.load_state_dict(state["kl"])
        self._scale.load_state_dict(state["scale"])


def _numbered(names: Sequence[str]) -> torch.Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])


def _reinforced(
    scored: Scored,
    annotation: Annotation,
    advantages_R: torch.Tensor,
    returns_R: Floats,
    policy_weight: Floats | float,
    value_weight: float,
) -> TrainSequence:
    rollout = scored.rollout
    count = len(rollout.tokens_R)
    return TrainSequence(
        uid=f"{rollout.prompt.uid}#{rollout.index}",
        origin=rollout.prompt.origin,
        source=scored.score.source,
        tokens_T=np.concatenate([rollout.prompt.tokens_P, rollout.tokens_R]),
        prompt_tokens=len(rollout.prompt.tokens_P),
        policy_weight_R=np.full(count, policy_weight, np.float32),
        value_weight_R=np.full(count, value_weight, np.float32),
        ce_weight_R=np.zeros(count, np.float32),
        advantages_R=advantages_R.numpy().astype(np.float32),
        returns_R=returns_R,
        logprobs_R=annotation.logprobs_R,
        reference_R=annotation.reference_R,
        values_R=annotation.values_R,
    )


def supervised(
    example: LabelledExample, weight: float = 1.0, source: str = "label"
) -> TrainSequence:
    """The training sequence of a labelled example: cross-entropy on its response alone."""
    count = len(example.tokens_R)
    zeros = np.zeros(count, np.float32)
    return TrainSequence(
        uid=example.prompt.uid,
        origin=example.prompt.origin,
        source=source,
        tokens_T=np.concatenate([example.prompt.tokens_P, example.tokens_R]),
        prompt_tokens=len(example.prompt.tokens_P),
        policy_weight_R=zeros,
        value_weight_R=zeros,
        ce_weight_R=np.full(count, weight, np.float32),
        advantages_R=zeros,
        returns_R=zeros,
        logprobs_R=zeros,
        reference_R=zeros,
        values_R=zeros,
    )


def updates(
    reinforced: Sequence[TrainSequence],
    take_supervised: Callable[[], list[TrainSequence]],
    algorithm: Algorithm,
    seed: int,
    step: int,
) -> list[list[TrainSequence]]:
    """The sequences of each update of a step: a part of the rollouts, newly shuffled each epoch,
    and supervised ones.

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
            if algorithm.aggregate == "sequence":
                rollouts = _equal_sequences(rollouts)
            made.append(rollouts + take_supervised())
    return made


def _equal_sequences(rollouts: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Policy weights so that Σ w·loss / N_policy is the mean over responses of the mean over their
    tokens (Shao et al. 2024, arXiv:2402.03300, eq. 3).
    """
    lengths = [int(np.count_nonzero(s.policy_weight_R)) for s in rollouts]
    mean = sum(lengths) / max(sum(length > 0 for length in lengths), 1)
    return [
        replace(s, policy_weight_R=s.policy_weight_R * np.float32(mean / max(length, 1)))
        for s, length in zip(rollouts, lengths, strict=True)
    ]
