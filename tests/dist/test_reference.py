"""Learner workers against tests/reference_ppo.py: after three steps the parameters of policy and
critic have moved alike, however the work was cut.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import ray
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ppo_dist.algo.advantages import Gae
from ppo_dist.cluster.groups import LearnerActor
from ppo_dist.config import Config
from ppo_dist.coordinator.experience import Experience, supervised, updates
from ppo_dist.learner.group import Learners
from ppo_dist.learner.worker import Seat
from ppo_dist.models.policy import load_policy
from ppo_dist.transport.store import StoreSender
from ppo_dist.reports import Coefficients
from ppo_dist.types import LabelledExample, Prompt, Rollout, Score, Scored
from tests.conftest import raw_config
from tests.reference_ppo import LORA, SEED, ReferenceTrainer, Sequence64, Settings

R = TypeVar("R")
STEPS = 3
AGREEMENT, MOVED = 1e-4, 1e-3


class Case(NamedTuple):
    """One way to cut the work."""

    stage: int
    world: int
    budget: int
    offload: str
    checkpointing: bool
    mix: str
    model: str


FACTORS = (
    (0, 1, 2, 3), (1, 2), (48, 4096), ("none", "cpu"), (False, True), ("ppo", "supervised", "mixed"),
)  # fmt: skip
GRID = [
    Case(*values, model=("gpt2", "llama")[number % 2])
    for number, values in enumerate(itertools.product(*FACTORS))
    if not (values[0] == 0 and values[3] == "cpu")  # refused: it would do nothing
]
PAIRWISE = [
    Case(0, 1, 48, "none", False, "ppo", "llama"),
    Case(0, 1, 4096, "none", False, "mixed", "gpt2"),
    Case(0, 2, 4096, "none", True, "supervised", "gpt2"),
    Case(1, 1, 4096, "cpu", True, "mixed", "gpt2"),
    Case(1, 2, 48, "none", False, "ppo", "llama"),
    Case(1, 2, 48, "none", True, "supervised", "gpt2"),
    Case(2, 1, 48, "cpu", False, "supervised", "llama"),
    Case(2, 1, 4096, "none", True, "ppo", "gpt2"),
    Case(2, 2, 4096, "none", False, "mixed", "llama"),
    Case(3, 1, 4096, "cpu", True, "supervised", "gpt2"),
    Case(3, 2, 48, "cpu", False, "ppo", "gpt2"),
    Case(3, 2, 48, "none", True, "mixed", "llama"),
]
MIXES = {
    "ppo": {"mu": 0.0, "policy_coef": 1.0},
    "supervised": {
        "mu": 1.0,
        "policy_coef": 0.0,
        "lr": 0.2,
        "max_grad_norm": 0.7,
        "critic_lr": 0.5,
        "critic_max_grad_norm": 0.5,
    },
    "mixed": {
        "mu": 0.5, "policy_coef": 1.0, "kl_coef": 0.0, "kl_loss_coef": 0.3, "entropy_coef": 0.1
    },
}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {
        "model": {"lora": LORA.model_dump()},
        "reference": {"reset": "never"},
    },
    "shared": {"critic": {"shared": True}},
    "phi": {},
}


def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i in range(len(case)) for j in range(i)}


def test_the_fast_cases_cover_all_pairs() -> None:
    assert set().union(*map(pairs, PAIRWISE)) >= set().union(*map(pairs, GRID))
    assert len(PAIRWISE) <= 12


# ── the work: three steps of rollouts and labelled examples ───────────────────────────────────────


@cache
def work() -> list[tuple[list[Scored], list[LabelledExample]]]:
    """Eleven rollouts of five prompts and three labelled examples a step; one-token answers, a
    one-token prompt, truncated responses, rewards of either sign. Nothing divides by two.
    """
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, 18, count)

    made = []
    for step in range(STEPS):
        scored: list[Scored] = []
        for p, (length, group) in enumerate(((5, 3), (1, 2), (9, 1), (4, 4), (12, 1))):
            prompt = Prompt(f"p:{step}.{p}", "verifiable", "", tokens(length))
            for index in range(group):
                response = tokens(int(rng.integers(1, 14)))
                cut_off = bool(rng.integers(2))
                if not cut_off:
                    response[-1] = 1
                blank = np.zeros(len(response), np.float32)
                rollout = Rollout(
                    prompt, index, response, blank, "", "length" if cut_off else "eos", step
                )
                scored.append(Scored(rollout, Score(float(rng.normal()), "test")))
        labelled = [
            LabelledExample(
                Prompt(f"l:{step}.{i}", "labelled", "", tokens(3 + i)), "", tokens(2 * i + 1)
            )
            for i in range(3)
        ]
        made.append((scored, labelled))
    return made


def settings(mix: str) -> Settings:
    base = {"lr": 0.02, "critic_lr": 0.3, "kl_coef": 0.05, "temperature": 0.8}
    return Settings(**{**base, **MIXES[mix]})


def algorithm(folder: Path, case: Case, variant: str = "plain") -> Config:
    wanted = settings(case.mix)
    return Config.model_validate(
        raw_config(
            folder,
            run={"seed": SEED},
            learner={
                "zero_stage": case.stage,
                "workers": case.world,
                "micro_batch_tokens": case.budget,
                "offload": case.offload,
                "gradient_checkpointing": case.checkpointing,
                "logits_chunk": 7,
                "max_grad_norm": wanted.max_grad_norm,
                "critic_max_grad_norm": wanted.critic_max_grad_norm,
            },
            rollout={"temperature": 0.8},
            algorithm={
                "epochs": 2,
                "minibatches": 2,
                "kl": {"kind": "loss", "coef": wanted.kl_loss_coef}
                if wanted.kl_loss_coef
                else wanted.kl_coef,
                "supervised_loss": "phi" if variant == "phi" else "nll",
                "old_logprobs": "recompute",
            },
            cluster={"kind": "ray"},
            **VARIANTS[variant],
        )
    )


def updates_of(config: Config, sequences: Any, labelled: Any, step: int) -> Any:
    return updates(sequences, lambda: list(map(supervised, labelled)), config.algorithm, SEED, step)


@cache
def expected(folder: str, mix: str, variant: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after, by the reference."""
    trainer = ReferenceTrainer(folder, settings(mix), variant)
    before = trainer.parameters()
    config = algorithm(Path("unused"), PAIRWISE[0])
    for step, (scored, labelled) in enumerate(work()):
        rollouts = [Sequence64.of(s.rollout, s.score.value) for s in scored]
        place = {f"{s.rollout.prompt.uid}#{s.rollout.index}": i for i, s in enumerate(scored)}
        blank = [_annotation(s) for s in scored]
        cut = updates_of(
            config, Experience(config.algorithm, Gae())(scored, blank, True), _taught(mix, labelled), step
        )
        targets = {e.prompt.uid: e for e in labelled}
        trainer.step(
            rollouts,
            [
                (
                    [place[q.uid] for q in update if q.uid in place],
                    [_labelled(targets[q.uid]) for q in update if q.uid in targets],
                )
                for update in cut
            ],
        )
    return before, trainer.parameters()


def _annotation(scored: Scored) -> Any:
    from ppo_dist.types import Annotation

    blank = np.zeros(len(scored.rollout.tokens_R), np.float32)
    return Annotation(blank, blank, blank, 0.0)


def _taught(mix: str, labelled: Sequence[LabelledExample]) -> Sequence[LabelledExample]:
    return labelled if MIXES[mix]["mu"] else []


def _labelled(example: LabelledExample) -> Sequence64:
    prompt = example.prompt.tokens_P.tolist()
    return Sequence64(prompt + example.tokens_R.tolist(), len(prompt))


# ── the system ────────────────────────────────────────────────────────────────────────────────────


class Probe(LearnerActor):
    """A learner worker that can be started anew and shows its parameters."""

    def weights(self) -> dict[str, np.ndarray]:
        every = [(f"policy.{n}", p.clone()) for n, p in self._roles.published()]
        every += [
            (n, p.clone()) for n, p in self._roles.policy.parameters(1000) if n == "value_head.weight"
        ]
        if self._roles.critic is not None:
            every += [(f"critic.{n}", p.clone()) for n, p in self._roles.critic.parameters(1000)]
        return {name: p.cpu().double().numpy() for name, p in every}

    def spoil(self, rank: int | None) -> None:
        """From now on a gradient of policy and critic is no number on that rank, though the losses
        are; None: nowhere.
        """
        for handle in vars(self).pop("_spoilt", []):
            handle.remove()
        if rank == torch.distributed.get_rank():
            engines = (self._roles.policy, self._roles.critic)
            self._spoilt = [
                next(p for p in e.module.parameters() if p.dim() > 1).register_hook(
                    lambda gradient: gradient * float("nan")
                )
                for e in engines
            ]

    def remembered(self) -> list[tuple[float, float]]:
        """Of each parameter of policy and critic, at stage 0: the steps that its optimizer counts,
        and the sum of what it remembers of gradients.
        """
        optimizers = [e._optimizer for e in (self._roles.policy, self._roles.critic)]
        states = [s for o in optimizers for p in o.param_groups[0]["params"] for s in [o.state[p]]]
        return [(float(state["step"]), float(state["exp_avg_sq"].sum())) for state in states]

    def watch(self) -> None:
        """Looks at the policy's gradients before each of its passes from now on."""
        policy, self._held = self._roles.policy, []

        def look(*_: object) -> None:
            assert all(p.grad is None for p in policy.module.parameters())
            self._held.append(policy._gradients is not None)

        policy.module.register_forward_pre_hook(look)

    def sleep(self) -> None:
        self._roles.sleep()

    def held(self) -> list[bool]:
        """Whether there was memory for them, in order."""
        return self._held

    def gathered(self, bucket_bytes: int) -> tuple[int, int, int]:
        """The most bytes of parameters that are whole at a time while all are gathered, those of
        the largest parameter, and those of all.
        """
        engine = self._roles.policy
        every = list(engine.module.parameters())
        most = 0
        for _ in engine.parameters(bucket_bytes):
            whole = [p for p in every if p.ds_status == ZeroParamStatus.AVAILABLE]
            most = max(most, sum(4 * p.ds_numel for p in whole))
        return most, max(4 * p.ds_numel for p in every), sum(4 * p.ds_numel for p in every)

    def compiles(self) -> bool:
        return "torch._inductor.compile_fx" in sys.modules


class Probes:
    """Ranks of learner.group, over processes that outlive a case."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._actors = [ray.remote(Probe).options(num_cpus=0.5).remote() for _ in range(world)]
        self._meeting = ray.get(self._actors[0].meeting_point.remote())

    def start(self, config: Config, folder: str) -> None:
        seats = [Seat(r, self.world, *self._meeting, "cpu") for r in range(self.world)]
        make_sender = partial(StoreSender, 2**20)
        ray.get([a.open.remote(make_sender) for a in self._actors])
        ray.get(
            [
                a.start.remote(config, folder, seat, None)
                for a, seat in zip(self._actors, seats, strict=True)
            ]
        )

    def call(self, method: Callable[..., R], args: Sequence[tuple[Any, ...]]) -> list[R]:
        return list(
            ray.get(
                [
                    getattr(a, method.__name__).remote(*rest)
                    for a, rest in zip(self._actors, args, strict=True)
                ]
            )
        )


@pytest.fixture(scope="module")
def probes(ray_session: None) -> Callable[[int], Probes]:
    return cache(Probes)


def parameters_after(probes: Probes, config: Config, folder: str, mix: str) -> dict[str, Any]:
    probes.start(config, folder)
    learners = Learners(
        probes, config.learner.micro_batch_tokens, config.critic.shared
    )
    wanted = settings(mix)
    coefficients = Coefficients(
        policy=wanted.policy_coef,
        value=wanted.value_coef,
        mu=wanted.mu,
        kl=wanted.kl_loss_coef,
        entropy=wanted.entropy_coef,
        lr=wanted.lr,
        critic_lr=wanted.critic_lr,

    )
    for step, (scored, labelled) in enumerate(work()):
        sequences = Experience(config.algorithm, Gae())(scored, learners.annotate([s.rollout for s in scored]), True)
        cut = updates_of(config, sequences, _taught(mix, labelled), step)
        learners.update(cut, coefficients)
    shown = probes.call(Probe.weights, [()] * probes.world)
    for name, values in shown[0].items():
        assert all(np.array_equal(values, other[name]) for other in shown), f"ranks differ: {name}"
    return shown[0]


def check(
    case: Case,
    probes: Callable[[int], Probes],
    models: dict[str, Path],
    run_folder: Path,
    variant: str = "plain",
) -> None:
    folder = str(models[case.model])
    config = algorithm(run_folder, case, variant)
    found = parameters_after(probes(case.world), config, folder, case.mix)
    before, after = expected(folder, case.mix, variant)
    assert found.keys() == after.keys()
    for name, values in found.items():
        start, found_here = before[name], torch.from_numpy(values)
        change = after[name] - start
        size = float(change.norm())
        if variant == "lora" and size == 0:
            assert torch.equal(found_here, start), f"{name} is frozen"
            continue
        assert size >= MOVED * float(start.norm()), f"{name} hardly moved: nothing is shown"
        difference = float((found_here - start - change).norm())
        assert difference <= AGREEMENT * size, (name, difference / size)


@pytest.mark.parametrize(
    ("variant", "stage", "world"),
    [
        ("lora", 0, 1),
        pytest.param("lora", 1, 2, marks=pytest.mark.slow),
        pytest.param("lora", 2, 1, marks=pytest.mark.slow),
        pytest.param("lora", 3, 2, marks=pytest.mark.slow),
        *(("shared", stage, 2 - stage % 2) for stage in range(4)),
        ("phi", 1, 2),
    ],
)
def test_variants_agree_with_the_reference(
    variant: str,
    stage: int,
    world: int,
    probes: Callable[[int], Probes],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    model = "gpt2" if stage % 2 else "llama"
    case = Case(stage, world, 48, "none", stage == 1, "mixed", model)
    check(case, probes, tiny_models, tmp_path, variant)


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda c: "-".join(map(str, c)))
def test_agrees_with_the_reference(
    case: Case,
    probes: Callable[[int], Probes],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    check(case, probes, tiny_models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(map(str, c)))
def test_agrees_with_the_reference_on_the_whole_grid(
    case: Case,
    probes: Callable[[int], Probes],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    check(case, probes, tiny_models, tmp_path)


PLAIN = Coefficients(1.0, 0.5, 0.5, 0.0, 0.0, 0.02, 0.3)


def with_momentum(case: Case, run_folder: Path, dtype: str = "fp32") -> Config:
    raw = algorithm(run_folder, case).model_dump(mode="json")
    raw["learner"] |= {"optimizer": {"kind": "sgd", "momentum": 0.9}, "dtype": dtype}
    return Config.model_validate(raw)


def two_updates(group: Probes, config: Config, folder: Path) -> tuple[Learners, Any, Any]:
    """Learners that have just started, and what they are to learn from in two updates."""
    scored, labelled = work()[0]
    group.start(config, str(folder))
    learners = Learners(group, 48)
    annotated = learners.annotate([s.rollout for s in scored])
    sequences = Experience(config.algorithm, Gae())(scored, annotated, True)
    first, second, *_ = updates_of(config, sequences, labelled, 0)
    return learners, first, second


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_that_is_not_finite_changes_nothing(
    stage: int, probes: Callable[[int], Probes], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Neither parameters nor the optimizer's momentum, of policy and critic alike."""
    case = Case(stage, 2, 48, "none", False, "mixed", "gpt2")
    config, group = with_momentum(case, tmp_path), probes(2)

    def after(poisoned: bool) -> dict[str, Any]:
        learners, first, second = two_updates(group, config, tiny_models["gpt2"])
        bad = replace(
            first[0],
            advantages_R=np.full_like(first[0].advantages_R, np.nan),
            returns_R=np.full_like(first[0].returns_R, np.inf),
        )
        middle = [[bad, *first[1:]]] if poisoned else []
        report = learners.update([first, *middle, second], PLAIN)
        assert [u.skipped for u in report.updates] == [False, *[True] * len(middle), False]
        return group.call(Probe.weights, [()] * 2)[0]

    with_it, without = after(True), after(False)
    for name, values in without.items():
        assert np.array_equal(with_it[name], values), name


def test_at_stage_0_the_memory_is_taken_at_the_start(
    probes: Callable[[int], Probes], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """AdamW's state is there before the first step; its count begins at none, and no parameter has
    moved. The memory of all gradients is there too, until the learner sleeps, and again before the
    first pass of the next update.
    """
    case = Case(0, 2, 48, "none", False, "mixed", "gpt2")
    raw = algorithm(tmp_path, case).model_dump(mode="json")
    raw["learner"]["optimizer"] = {"kind": "adamw", "weight_decay": 0.1}
    group = probes(2)
    learners, first, _ = two_updates(group, Config.model_validate(raw), tiny_models["gpt2"])
    assert set(group.call(Probe.remembered, [()] * 2)[0]) == {(0.0, 0.0)}
    before = group.call(Probe.weights, [()] * 2)[0]
    for name, values in load_policy(str(tiny_models["gpt2"]), torch.float32).named_parameters():
        assert np.array_equal(before[f"policy.{name}"], values.detach().double().numpy()), name
    group.call(Probe.watch, [()] * 2)
    learners.update([first], PLAIN)
    steps, squares = zip(*group.call(Probe.remembered, [()] * 2)[0], strict=True)
    assert set(steps) == {1.0} and sum(squares) > 0.0
    rollouts = [s.rollout for s in work()[0][0]]
    learners.annotate(rollouts)
    assert all(group.call(Probe.held, [()] * 2)[0]), "it stays after an update"
    group.call(Probe.sleep, [()] * 2)
    learners.annotate(rollouts)
    learners.update([first], PLAIN)
    in_order = [held for held, _ in itertools.groupby(group.call(Probe.held, [()] * 2)[0])]
    assert in_order == [True, False, True], "until it sleeps, asleep, in the next update"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "offload"),
    [
        *((stage, "fp32", "none") for stage in range(4)),
        *((stage, "bf16", "none") for stage in range(4)),
        *((stage, dtype, "cpu") for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    ],
)
def test_one_rank_with_a_gradient_that_is_no_number(
    stage: int,
    dtype: str,
    offload: str,
    probes: Callable[[int], Probes],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    """All ranks leave the update out, though only one has seen it, and go on as if it had not been."""
    case = Case(stage, 2, 48, offload, False, "mixed", "gpt2")
    config, group = with_momentum(case, tmp_path, dtype), probes(2)

    def after(spoilt: bool) -> dict[str, Any]:
        learners, first, second = two_updates(group, config, tiny_models["gpt2"])
        learners.update([first], PLAIN)
        if spoilt:
            group.call(Probe.spoil, [(1,)] * 2)
            report = learners.update([first], PLAIN)
            assert [u.skipped for u in report.updates] == [True]
            group.call(Probe.spoil, [(None,)] * 2)
        learners.update([second], PLAIN)
        return group.call(Probe.weights, [()] * 2)[0]

    with_it, without = after(True), after(False)
    for name, values in without.items():
        assert np.isfinite(values).all() and np.array_equal(with_it[name], values), name


def test_no_rank_gathers_more_than_a_bucket(
    probes: Callable[[int], Probes], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Under ZeRO-3 a model that is sent, or saved whole, may be larger than a rank's device."""
    case = Case(3, 2, 48, "none", False, "mixed", "llama")
    group = probes(2)
    group.start(algorithm(tmp_path, case), str(tiny_models["llama"]))
    for limit in (1, 2**14):
        for most, largest, everything in group.call(Probe.gathered, [(limit,)] * 2):
            assert 0 < most <= max(limit, largest) < everything / 2


def test_no_learner_waits_for_a_compiler(
    probes: Callable[[int], Probes], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """DeepSpeed imports torch's unless it is kept from it: 2 s of every start."""
    case = Case(2, 1, 48, "none", False, "mixed", "llama")
    parameters_after(probes(1), algorithm(tmp_path, case), str(tiny_models["llama"]), case.mix)
    assert probes(1).call(Probe.compiles, [()]) == [False]
