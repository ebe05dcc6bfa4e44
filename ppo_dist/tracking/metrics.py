"""Records to metrics rows: names, and what each number means. Nothing to count is None, and every
row has every key; those of workers that came later are in the rows from then on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import numpy as np

from ppo_dist.config import ORIGINS, Config, corrects, reward_models, uses
from ppo_dist.config.algorithm import KlInLoss
from ppo_dist.reports import Coefficients, StepReport, TermSums, Vitals
from ppo_dist.types import Annotation, Floats, MixPlan, Rollout, Scored, TrainSequence

Row = dict[str, float | None]
EVALUATED = ("accuracy", "reward", "sampled_accuracy", "nll", "dropped")
STAGES = ("generate", "score", "annotate", "update", "publish", "evaluate", "save", "step")
IDLE = ("rollout", "learner")  # of whom it is told
WORKERS = "system/"
VITALS = ("busy_s", "cores", "memory_gb", "gpu_memory_gb")


class Stopwatch:
    """Seconds by stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin


def keys(config: Config) -> list[str]:
    """Every key that a row of this run has."""
    names = [f"reward/{origin}/mean" for origin in ORIGINS if uses(config, origin)]
    names += ["reward/faults", "reward/dropped", "objective/kl_coef", "objective/advantage_std"]
    if config.reference is not None:
        names.append("objective/kl")
    of_policy = ("loss", "approx_kl", "approx_kl_k1", "clip_fraction", "entropy", "grad_norm", "lr")
    names += [f"policy/{k}" for k in of_policy]
    if corrects(config):
        names += ["policy/correction_mean", "policy/correction_cut_rate"]
    if config.algorithm.reward.normalise:
        names.append("reward/scale")
    if config.algorithm.reward.clip is not None:
        names.append("reward/clipped_rate")
    if isinstance(config.algorithm.kl, KlInLoss):
        names.append("policy/kl_loss")
    if config.algorithm.has_critic:
        names += [
            f"critic/{k}"
            for k in ("loss", "explained_variance", "clip_fraction", "grad_norm", "lr")
        ]
    names += [f"guard/{k}" for k in ("action", "gap", "skipped_updates")]
    names += [f"sup/{k}" for k in ("loss", "accuracy", "tokens")]
    names += ["semi/mu", "semi/labelled_share"]
    names += [f"semi/policy_tokens/{origin}" for origin in ORIGINS if uses(config, origin)]
    names += _unlabelled_keys(config)
    names += [f"rollout/{k}" for k in ("tokens", "length_mean", "truncated_rate", "logprob_gap")]
    names += ["rollout/version_lag", "rollout/dropped"]
    names += _machine_keys(config)
    for name, sources in (("held_out", config.data.held_out), ("test", config.data.test)):
        if sources:
            names += [f"eval/{name}/{k}" for k in EVALUATED]
    return names


def _machine_keys(config: Config) -> list[str]:
    names = [f"timing_s/{stage}" for stage in (*STAGES, *(f"idle_{role}" for role in IDLE))]
    names += ["perf/tokens_per_s", "perf/learner_mfu"]
    names += [f"perf/idle_{role}_share" for role in IDLE]
    workers = {
        "rollout": config.rollout.workers,
        "learner": config.learner.workers,
        "reward": sum(model.workers for model in reward_models(config)),
    }
    for role, count in workers.items():
        names += [f"{WORKERS}{role}-{n}/{key}" for n in range(count) for key in VITALS]
    return names


def _unlabelled_keys(config: Config) -> list[str]:
    names: list[str] = []
    if uses(config, "unlabelled"):
        names.append("semi/admitted_share")
        names += [
            f"pseudo/{k}" for k in ("vote_share", "vote_margin", "vote_entropy", "abstain_rate")
        ]
    if config.semi.pseudo is not None:
        names += [f"pseudo/{k}" for k in ("accept_rate", "size", "age", "weight", "tokens")]
    if config.semi.probe:
        names += [
            f"pseudo/{k}"
            for k in (
                "label_accuracy_probe",
                "label_accuracy_probe_all",
                "reward_accuracy_probe",
            )
        ]
    return names


def step_row(
    plan: MixPlan,
    coefficients: Coefficients,
    version: int,
    scored: Sequence[Scored],
    annotated: Sequence[tuple[Rollout, Annotation]],
    sequences: Sequence[TrainSequence],
    report: StepReport,
) -> Row:
    """All that a step tells, timings aside. Of everything `scored`, what was learned from is
    `annotated`, and became `sequences`.
    """
    return {
        **_rewards(scored),
        **_rollouts([s.rollout for s in scored], version),
        **_agreement(annotated, report),
        **_updates(report, coefficients),
        "perf/learner_mfu": report.mfu,
        "critic/explained_variance": _explained_variance(sequences),
        "objective/advantage_std": _advantage_std(sequences),
        "semi/mu": plan.mu,
        **_provenance(sequences),
    }


def took(vitals: Mapping[str, Mapping[int, Vitals]]) -> Row:
    """What each worker's process takes, by role and number."""
    return {
        f"{WORKERS}{role}-{number}/{key}": value
        for role, workers in vitals.items()
        for number, told in workers.items()
        for key, value in zip(VITALS, _taken(told), strict=True)
    }


def _taken(told: Vitals) -> tuple[float | None, ...]:
    memory = (None if n is None else n / 1e9 for n in (told.memory, told.gpu_memory))
    return told.busy_s, _share(told.cpu_s, told.seconds), *memory


def timings(
    seconds: Mapping[str, float], row: Row, vitals: Mapping[str, Mapping[int, Vitals]]
) -> Row:
    """Seconds by stage; response and supervised tokens learned from per second of the step; and how
    long rollout workers and learners, on average and by their own clocks, had nothing to do in it.
    A response counts in the step that learns from it, whenever it was written.
    """
    tokens = (row.get("rollout/tokens") or 0) + (row.get("sup/tokens") or 0)
    step = seconds["step"]
    idle = {}
    for role in IDLE:
        busy = mean([each.busy_s for each in vitals[role].values()]) or 0.0
        idle[f"idle_{role}"] = max(step - busy, 0.0)
    return {
        **{f"timing_s/{stage}": value for stage, value in {**seconds, **idle}.items()},
        **{f"perf/{name}_share": _share(value, step) for name, value in idle.items()},
        "perf/tokens_per_s": tokens / step if step > 0 and tokens else None,
    }


def evaluation_row(
    name: str,
    greedy: Sequence[Scored],
    sampled: Sequence[Scored],
    nll: float | None,
    dropped: float | None = None,
) -> Row:
    """Accuracy is the share of responses with a reward of at least 1; `nll` that of the labelled
    responses, per token; `dropped` counts responses without a reward.
    """
    numbers = (
        mean([s.score.is_right for s in greedy]),
        mean([s.score.value for s in greedy]),
        mean([s.score.is_right for s in sampled]),
        nll,
        dropped,
    )
    return {f"eval/{name}/{key}": number for key, number in zip(EVALUATED, numbers, strict=True)}


def _provenance(sequences: Sequence[TrainSequence]) -> Row:
    """Tokens that the policy loss is on, by origin of their prompt."""
    return {
        f"semi/policy_tokens/{origin}": float(
            sum(np.count_nonzero(s.policy_weight_R) for s in sequences if s.origin == origin)
        )
        for origin in ORIGINS
    }


def _rewards(scored: Sequence[Scored]) -> Row:
    row: Row = {
        f"reward/{origin}/mean": mean(
            [s.score.value for s in scored if s.rollout.prompt.origin == origin]
        )
        for origin in ORIGINS
    }
    row["reward/faults"] = float(sum(s.score.fault is not None for s in scored)) if scored else None
    return row


def _agreement(annotated: Sequence[tuple[Rollout, Annotation]], report: StepReport) -> Row:
    """How far the policy is from its reference, and the learners from what generated. Where the
    policy was not asked before the first update, that update tells: it meets the same policy.
    """
    gaps = [float(np.abs(a.logprobs_R - r.logprobs_R).sum(dtype=np.float64)) for r, a in annotated]
    gap = _share(sum(gaps), sum(len(r.tokens_R) for r, _ in annotated))
    if gap == 0 and report.updates and report.updates[0].sums.acted:
        gap = report.updates[0].sums.moved / report.updates[0].sums.acted
    return {
        "objective/kl": mean([float((a.logprobs_R - a.reference_R).sum()) for _, a in annotated]),
        "rollout/logprob_gap": gap,
    }


def _rollouts(rollouts: Sequence[Rollout], version: int) -> Row:
    return {
        "rollout/tokens": float(sum(len(r.tokens_R) for r in rollouts)),
        "rollout/length_mean": mean([len(r.tokens_R) for r in rollouts]),
        "rollout/truncated_rate": mean([r.finish == "length" for r in rollouts]),
        "rollout/version_lag": mean([version - r.version for r in rollouts]),
    }


def _updates(report: StepReport, coefficients: Coefficients) -> Row:
    made = [u for u in report.updates if not u.skipped]
    total = reduce(TermSums.__add__, (u.sums for u in made), TermSums())
    policy = sum(u.counts.policy for u in made)
    value = sum(u.counts.value for u in made)
    ce = sum(u.counts.ce for u in made)
    return {
        "guard/skipped_updates": float(len(report.updates) - len(made)),
        "policy/kl_loss": _share(total.kl_loss, policy),
        "policy/loss": _share(total.policy_loss, policy),
        "policy/approx_kl": _share(total.kl, total.acted),
        "policy/approx_kl_k1": _share(total.kl_k1, total.acted),
        "policy/clip_fraction": _share(total.clipped, total.acted),
        "policy/entropy": _share(total.entropy, total.acted),
        "policy/grad_norm": mean([u.grad_norm for u in made if u.grad_norm is not None]),
        "policy/lr": coefficients.lr,
        "critic/loss": _share(total.value_loss, value),
        "critic/clip_fraction": _share(total.value_clipped, value),
        "critic/grad_norm": mean(
            [u.critic_grad_norm for u in made if u.critic_grad_norm is not None]
        ),
        "critic/lr": coefficients.critic_lr,
        "sup/loss": _share(total.ce_loss, ce),
        "sup/accuracy": _share(total.ce_correct, ce),
        "sup/tokens": float(ce),
        "semi/labelled_share": _share(ce, ce + policy),
    }


def _explained_variance(sequences: Sequence[TrainSequence]) -> float | None:
    """1 − Var(G − V) / Var(G) over the step's response tokens; None if the returns do not vary."""
    variance = _variance(s.returns_R for s in sequences)
    if variance is None or not variance > 0:
        return None
    return 1 - (_variance(s.returns_R - s.values_R for s in sequences) or 0.0) / variance


def _advantage_std(sequences: Sequence[TrainSequence]) -> float | None:
    """Of the advantages that the policy learns from; 0 means that there is nothing to learn."""
    variance = _variance(s.advantages_R[s.policy_weight_R != 0] for s in sequences)
    return None if variance is None else math.sqrt(variance)


def _variance(rows: Iterable[Floats]) -> float | None:
    """Of all their values, by the pairwise update of Chan et al. 1979; None of nothing."""
    count, mean, squares = 0, 0.0, 0.0
    for row in filter(len, rows):  # each is done with while the cache has it
        own = float(row.sum(dtype=np.float64)) / len(row)
        apart = np.subtract(row, own, dtype=np.float64)
        count, gap = count + len(row), own - mean
        share = len(row) / count
        squares += float(apart @ apart) + gap * gap * share * (count - len(row))
        mean += gap * share
    return squares / count if count else None


def _share(total: float, count: float) -> float | None:
    return total / count if count else None


def mean(values: Sequence[float | bool] | np.ndarray) -> float | None:
    """None of nothing."""
    return float(np.mean(values)) if len(values) else None
