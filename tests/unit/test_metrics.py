"""Metrics rows: what each number means, and that nothing to count is None."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ppo_dist.config import ORIGINS, Config
from ppo_dist.reports import Coefficients, StepReport, TermSums, TokenCounts, UpdateReport, Vitals
from ppo_dist.tracking.console import Losable, Several, Terminal, describe
from ppo_dist.tracking.metrics import (
    STAGES,
    Stopwatch,
    evaluation_row,
    keys,
    step_row,
    timings,
    took,
)
from ppo_dist.types import Annotation, MixPlan, Prompt, Rollout, Score, Scored, TrainSequence

PLAN = MixPlan({"labelled": 1, "verifiable": 2, "unlabelled": 0}, 4, mu=0.3, policy_coef=0.7)
COEFFICIENTS = Coefficients(
    policy=0.7, value=0.5, mu=0.3, kl=0.0, entropy=0.0, lr=1e-3, critic_lr=2e-3
)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def scored(
    origin: str, reward: float, length: int, finish: str = "eos", version: int = 4
) -> Scored:
    prompt = Prompt(f"{origin}/0:0", origin, "q", np.ones(1, np.int64))  # type: ignore[arg-type]
    tokens, logprobs = np.ones(length, np.int64), np.full(length, -1, np.float32)
    fault = "oops" if reward == 0 else None
    made = Rollout(prompt, 0, tokens, logprobs, "r", finish, version)  # type: ignore[arg-type]
    return Scored(made, Score(reward, "s", fault))


def sequence(returns: list[float], values: list[float]) -> TrainSequence:
    one = np.ones(len(returns), np.float32)
    tokens = np.ones(len(returns) + 1, np.int64)
    advantages = floats(*values)
    return TrainSequence(
        "u",
        "verifiable",
        "s",
        tokens,
        1,
        one,
        one,
        one,
        advantages,
        floats(*returns),
        one,
        one,
        floats(*values),
    )


ROLLOUTS = [
    scored("labelled", 1.0, 2, version=3),
    scored("verifiable", 0.0, 1, finish="length"),
    scored("verifiable", 0.5, 3),
]
ANNOTATIONS = [
    Annotation(floats(-1, -2), floats(-2, -2), floats(0, 0), 0.0),
    Annotation(floats(-1), floats(-0.5), floats(0), 0.0),
    Annotation(floats(-1, -1, -1.5), floats(-2, -2, -2.5), floats(0, 0, 0), 0.0),
]
ANNOTATED = [(s.rollout, a) for s, a in zip(ROLLOUTS, ANNOTATIONS, strict=True)]
SUMS = TermSums(
    policy_loss=-3.0,
    acted=4.0,
    clipped=1.0,
    kl=0.5,
    kl_k1=0.75,
    kl_loss=1.5,
    entropy=12.0,
    value_loss=6.0,
    value_clipped=2.0,
    ce_loss=8.0,
    ce_correct=3.0,
)
REPORT = StepReport(
    (
        UpdateReport(TokenCounts(policy=4, value=4, ce=10), SUMS, 1.0, 3.0),
        UpdateReport(TokenCounts(policy=2, value=2, ce=6), SUMS, 2.0, None),
    ),
    vitals=(Vitals(1.5),),
    mfu=0.25,
)


def test_where_old_log_probabilities_were_taken_over_the_first_update_tells_the_gap() -> None:
    told = [(r, replace(a, logprobs_R=r.logprobs_R)) for r, a in ANNOTATED]
    first, second = REPORT.updates
    moved = replace(first, sums=replace(SUMS, moved=0.5))
    report = replace(REPORT, updates=(moved, replace(second, sums=replace(SUMS, moved=3.0))))
    row = step_row(PLAN, COEFFICIENTS, 4, ROLLOUTS, told, [], report)
    assert row["rollout/logprob_gap"] == 0.5 / 4


def test_the_row_of_a_step() -> None:
    sequences = [sequence([1, 2], [1, 1]), sequence([3, 6], [3, 4])]
    row = step_row(PLAN, COEFFICIENTS, 4, ROLLOUTS, ANNOTATED, sequences, REPORT)
    assert row == pytest.approx(
        {
            "reward/labelled/mean": 1.0,
            "reward/verifiable/mean": 0.25,
            "reward/unlabelled/mean": None,
            "reward/faults": 1.0,
            "objective/kl": (1.0 - 0.5 + 3.0) / 3,  # per sequence, summed over its tokens
            "objective/advantage_std": math.sqrt(1.6875),  # of 1 1 3 4
            "rollout/tokens": 6.0,
            "rollout/length_mean": 2.0,
            "rollout/truncated_rate": 1 / 3,
            "rollout/logprob_gap": 1.5 / 6,  # over all tokens
            "rollout/version_lag": 1 / 3,
            "policy/loss": -6 / 6,
            "policy/approx_kl": 1 / 8,  # over those computed
            "policy/approx_kl_k1": 1.5 / 8,
            "policy/clip_fraction": 2 / 8,
            "policy/entropy": 24 / 8,
            "policy/kl_loss": 3 / 6,
            "policy/grad_norm": 1.5,
            "policy/lr": 1e-3,
            "critic/loss": 12 / 6,
            "critic/clip_fraction": 4 / 6,
            "critic/grad_norm": 3.0,
            "critic/lr": 2e-3,
            # returns 1 2 3 6 (variance 3.5), errors 0 1 0 2 (variance 0.6875)
            "critic/explained_variance": 1 - 0.6875 / 3.5,
            "sup/loss": 1.0,
            "sup/accuracy": 6 / 16,
            "sup/tokens": 16.0,
            "semi/labelled_share": 16 / 22,
            "semi/mu": 0.3,
            "semi/policy_tokens/labelled": 0.0,
            "semi/policy_tokens/verifiable": 4.0,
            "semi/policy_tokens/unlabelled": 0.0,
            "guard/skipped_updates": 0.0,
            "perf/learner_mfu": 0.25,
        }
    )


def supervised_row() -> dict[str, float | None]:
    sums = TermSums(ce_loss=5.0, ce_correct=4.0)
    report = StepReport((UpdateReport(TokenCounts(0, 0, 10), sums, 1.0, None),))
    return step_row(PLAN, COEFFICIENTS, 4, [], [], [], report)


def test_without_rollouts_there_is_none_and_not_nought() -> None:
    row = supervised_row()
    counted = {k for k, value in row.items() if value is not None}
    assert counted == {
        "guard/skipped_updates",
        *(f"semi/policy_tokens/{origin}" for origin in ORIGINS),
        "rollout/tokens",
        "policy/grad_norm",
        "policy/lr",
        "critic/lr",
        "sup/loss",
        "sup/accuracy",
        "sup/tokens",
        "semi/mu",
        "semi/labelled_share",
    }
    assert row["rollout/tokens"] == 0.0
    assert (row["sup/loss"], row["sup/accuracy"]) == (0.5, 0.4)
    assert row["semi/labelled_share"] == 1.0


def test_without_labelled_examples_there_is_no_supervised_loss() -> None:
    report = StepReport((UpdateReport(TokenCounts(6, 6, 0), SUMS, 1.0, 1.0),))
    row = step_row(PLAN, COEFFICIENTS, 4, ROLLOUTS, ANNOTATED, [], report)
    assert (row["sup/loss"], row["sup/accuracy"], row["sup/tokens"]) == (None, None, 0.0)
    assert row["semi/labelled_share"] == 0.0


@pytest.mark.parametrize(
    ("returns", "values", "explained"),
    [
        ([1, 3], [1, 3], 1.0),
        ([1, 3], [5, 7], 1.0),  # a constant error is not counted: only the variance
        ([1, 3], [9, 9], 0.0),
        ([1, 3], [3, 1], -3.0),
        ([2, 2], [1, 3], None),
    ],
)
def test_explained_variance(
    returns: list[float], values: list[float], explained: float | None
) -> None:
    row = step_row(PLAN, COEFFICIENTS, 0, [], [], [sequence(returns, values)], REPORT)
    got = row["critic/explained_variance"]
    assert got == (explained if explained is None else pytest.approx(explained))


@pytest.mark.parametrize("lengths", [(1, 0, 5, 3), (4, 1), (2, 2, 2)])
def test_variances_are_of_all_values_of_rows_of_any_length(lengths: tuple[int, ...]) -> None:
    numbers = [10.0 + np.random.default_rng(n).normal(size=n + 1)[:n] * n for n in lengths]
    made = [sequence(list(row), list(0.5 * row)) for row in numbers]
    row = step_row(PLAN, COEFFICIENTS, 0, [], [], made, REPORT)
    returns = np.concatenate([s.returns_R for s in made]).astype(np.float64)
    left = returns - np.concatenate([s.values_R for s in made])
    explained = 1 - np.var(left) / np.var(returns)
    assert row["critic/explained_variance"] == pytest.approx(explained, rel=1e-5)
    advantages = np.concatenate([s.advantages_R for s in made])
    assert row["objective/advantage_std"] == pytest.approx(float(np.std(advantages)), rel=1e-5)


def test_equal_values_do_not_vary_at_all() -> None:
    made = [sequence([0.1] * n, [0.3] * n) for n in (1, 7, 3)]
    row = step_row(PLAN, COEFFICIENTS, 0, [], [], made, REPORT)
    assert row["critic/explained_variance"] is None


def test_evaluation() -> None:
    greedy = [scored("labelled", r, 1) for r in (1.0, 0.5, 1.5, 0.0)]
    row = evaluation_row("test", greedy, [scored("labelled", 1.0, 1)], nll=0.25, dropped=2.0)
    assert row == {
        "eval/test/accuracy": 0.5,
        "eval/test/reward": 0.75,
        "eval/test/sampled_accuracy": 1.0,
        "eval/test/nll": 0.25,
        "eval/test/dropped": 2.0,
    }
    assert evaluation_row("test", greedy, [], None)["eval/test/sampled_accuracy"] is None


def at_work(rollout: float, learner: float) -> dict[str, dict[int, Vitals]]:
    """Two rollout workers, one of which did nothing, and a learner."""
    first, third = (Vitals(s, 2.0, 1.8, 2 * 10**9) for s in (2 * rollout, learner))
    return {"rollout": {0: first, 3: Vitals()}, "learner": {0: third}}


NOTHING = at_work(0.0, 0.0)


def test_timings() -> None:
    seconds = {**dict.fromkeys(STAGES, 0.5), "step": 2.0}
    row = timings(seconds, {"rollout/tokens": 30.0, "sup/tokens": 10.0}, at_work(0.75, 1.5))
    assert row["perf/tokens_per_s"] == 20.0
    assert row["timing_s/update"] == 0.5
    assert (row["timing_s/idle_learner"], row["perf/idle_learner_share"]) == (0.5, 0.25)
    assert (row["timing_s/idle_rollout"], row["perf/idle_rollout_share"]) == (1.25, 0.625)
    assert timings(seconds, {}, at_work(3.0, 0.0))["timing_s/idle_rollout"] == 0.0, (
        "begun before the step"
    )
    assert timings(seconds, {"sup/tokens": 10.0}, NOTHING)["perf/tokens_per_s"] == 5.0
    assert timings(seconds, {"rollout/tokens": 0.0}, NOTHING)["perf/tokens_per_s"] is None
    nothing = timings(Stopwatch().seconds, {"sup/tokens": 1.0}, NOTHING)
    assert nothing["perf/tokens_per_s"] is None and nothing["perf/idle_learner_share"] is None


def test_each_worker_tells_what_it_takes() -> None:
    row = took(at_work(0.75, 1.5))
    assert row["system/rollout-0/busy_s"] == 1.5 and row["system/rollout-3/busy_s"] == 0.0
    assert row["system/learner-0/cores"] == 0.9 and row["system/learner-0/memory_gb"] == 2.0
    assert row["system/rollout-3/cores"] is None and row["system/rollout-3/memory_gb"] is None
    assert len(row) == 12


def test_the_stopwatch_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.5, 20.0, 20.25, 30.0, 37.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    for _ in range(2):
        with watch("update"):
            pass
    with pytest.raises(KeyError), watch("save"):
        raise KeyError
    assert watch.seconds == {**dict.fromkeys(STAGES, 0.0), "update": 1.75, "save": 7.0}


def config(*origins: str, held_out: bool = False, semi: Any = None, **algorithm: str) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "x"},
            "train": {"steps": 1},
            "model": {"path": "m"},
            "data": {
                **dict.fromkeys(origins, "f.jsonl"),
                **({"held_out": "h.jsonl"} if held_out else {}),
            },
            "reward": {"verifiable": "exact", "labelled": "exact", "unlabelled": "vote"},
            "mix": {"shares": {"verifiable": 0, **dict.fromkeys(origins, 1)}},
            "semi": semi or {},
            "algorithm": algorithm,
            "rollout": {"group_size": 2},
        }
    )


def test_keys_name_everything_that_a_run_tells() -> None:
    told = step_row(PLAN, COEFFICIENTS, 4, ROLLOUTS, ANNOTATED, [], REPORT)
    told |= timings(Stopwatch().seconds, told, NOTHING) | evaluation_row("held_out", [], [], None)
    told |= took({role: {0: Vitals()} for role in ("rollout", "learner")})
    told["objective/kl_coef"] = 0.1  # the loop knows it, and what the guard says
    told |= {"guard/gap": None, "guard/action": 0.0}
    told |= {"rollout/dropped": 0.0, "reward/dropped": None}
    named = keys(config("labelled", "verifiable", "unlabelled", held_out=True))
    votes = {f"pseudo/{k}" for k in ("vote_share", "vote_margin", "vote_entropy", "abstain_rate")}
    assert len(named) == len(set(named))
    assert set(named) == set(told) - {"policy/kl_loss"} | votes | {"semi/admitted_share"}
    # a supervised step has the very same keys
    assert set(supervised_row()) <= {*named, "policy/kl_loss"}
    # and what a run has no data for, it does not name
    fewer = keys(config("verifiable"))
    assert set(told) - set(fewer) == {
        *(f"reward/{origin}/mean" for origin in ("labelled", "unlabelled")),
        *(f"semi/policy_tokens/{origin}" for origin in ("labelled", "unlabelled")),
        "policy/kl_loss",
        *evaluation_row("held_out", [], [], None),
    }
    assert set(fewer) <= set(told)
    others = keys(config("verifiable", kl="loss", advantage="rloo"))
    assert set(others) ^ set(fewer) == {"policy/kl_loss", *(k for k in told if "critic/" in k)}
    more = keys(config("labelled", "unlabelled", semi={"probe": 0.5, "pseudo": {"batch": 1}}))
    less = keys(config("labelled", "unlabelled"))
    assert {k.split("/")[1] for k in set(more) - set(less)} == {
        *("accept_rate", "size", "age", "weight", "tokens"),
        *("label_accuracy_probe", "label_accuracy_probe_all", "reward_accuracy_probe"),
    }


def test_a_skipped_update_is_counted_and_adds_nothing() -> None:
    skipped = UpdateReport(
        TokenCounts(5, 5, 5), TermSums(policy_loss=math.nan), math.inf, critic_grad_norm=1.0
    )
    report = replace(REPORT, updates=(*REPORT.updates, skipped))
    row = step_row(PLAN, COEFFICIENTS, 4, ROLLOUTS, ANNOTATED, [], report)
    plain = step_row(PLAN, COEFFICIENTS, 4, ROLLOUTS, ANNOTATED, [], REPORT)
    assert row == plain | {"guard/skipped_updates": 1.0}


def test_sums_add_up_field_by_field() -> None:
    assert SUMS + TermSums(ce_loss=1.0) == replace(SUMS, ce_loss=SUMS.ce_loss + 1.0)
    doubled = SUMS + SUMS
    assert all(vars(doubled)[name] == 2 * value for name, value in vars(SUMS).items())


def test_describe_leaves_out_what_has_no_number() -> None:
    row = {"reward/verifiable/mean": None, "reward/labelled/mean": 0.25, "sup/loss": None}
    assert describe(row) == "reward 0.250"
    row |= {"objective/kl": -0.5, "perf/tokens_per_s": 1234.6, "eval/held_out/accuracy": 0.125}
    assert describe(row) == "reward 0.250  KL -0.500  tokens/s 1235  held-out 12.5%"
    assert describe({}) == ""


def test_a_terminal_that_is_none_gets_plain_lines() -> None:
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=100), total=2, done=0)
    terminal.log(2, {"sup/loss": 0.5})
    terminal.table(2, [{"response": "hidden"}])
    terminal.close()
    assert text.getvalue().startswith("step 2/2  sup 0.500  0 s left")
    assert "hidden" not in text.getvalue()


def test_several_trackers_get_the_same() -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def log(self, *given: object) -> None:
            self.seen.append(given)

        table = log

        def close(self) -> None:
            self.seen.append("closed")

    notes = [Notes(), Notes()]
    both = Several(notes)
    both.log(1, {"a": 2.0})
    both.table(1, [{"b": "c"}])
    both.close()
    assert notes[0].seen == notes[1].seen == [(1, {"a": 2.0}), (1, [{"b": "c"}]), "closed"]


def test_a_tracker_that_is_lost_is_done_without() -> None:
    class Breaking:
        calls = 0

        def log(self, *given: object) -> None:
            self.calls += 1
            if self.calls > 1:
                raise ConnectionResetError("gone")

        def close(self) -> None:
            raise AssertionError("it is not asked again")

    told: list[str] = []
    breaking = Breaking()
    tracker = Losable(lambda: breaking, lambda error: told.append(str(error)))
    for step in range(3):
        tracker.log(step, {"a": 2.0})
    tracker.close()
    assert told == ["gone"] and breaking.calls == 2


def test_a_tracker_that_cannot_be_made_is_done_without() -> None:
    def make() -> None:
        raise ConnectionError("no route")

    told: list[str] = []
    tracker = Losable(make, lambda error: told.append(str(error)))
    tracker.log(0, {"a": 2.0})
    tracker.close()
    assert told == ["no route"]


def test_an_alert_is_shown_as_it_is() -> None:
    """What an error says may look like markup."""
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=200), 3, 0)
    terminal.alert(2, "learners were lost", "[/__w/pytorch/pair.cc:534] [red]closed")
    assert (
        shown.getvalue() == "step 2: learners were lost; [/__w/pytorch/pair.cc:534] [red]closed\n"
    )
