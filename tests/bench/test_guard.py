"""No stage may become much slower than the bare work in it: ratios of one moment on one machine,
generous, so that only a real regression is seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppo_dist import build
from ppo_dist.build import engines
from ppo_dist.config import Config
from ppo_dist.config.data import FromScratch
from ppo_dist.models.scratch import make_model
from ppo_dist.types import Chunk, Prompt, Request, Rollout, Sampling, TrainSequence
from tests.bench.machine import timed_in_turn
from tests.bench.own import COEFFICIENTS, bare, packed
from tests.conftest import raw_config

SHAPE = FromScratch(layers=4, hidden=192, heads=6, context=128)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    make_model(tmp_path / "model", SHAPE, ["abcdefghijklmnop>"], seed=1)
    learner = {"micro_batch_tokens": 2048, "lr": 1e-6, "critic_lr": 1e-6, "optimizer": "adamw"}
    raw = raw_config(tmp_path / "run", learner=learner)
    return Config.model_validate({**raw, "model": {"path": str(tmp_path / "model")}})


def sequences(count: int) -> list[TrainSequence]:
    """Of mixed lengths, with and without a common beginning."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        length = int(rng.integers(8, 60))
        tokens_T = rng.integers(3, 18, 20 + length)
        row = rng.normal(size=length).astype(np.float32)
        ones, zeros = np.ones(length, np.float32), np.zeros(length, np.float32)
        columns = (ones, ones, zeros, row, row, -np.abs(row), zeros, row)
        made.append(TrainSequence(f"p:{n}", "verifiable", "exact", tokens_T, 20, *columns))
    return made


def rollouts(sequences: list[TrainSequence]) -> list[Rollout]:
    """What they were learned from."""
    return [
        Rollout(
            Prompt(s.uid, "verifiable", "", s.tokens_T[: s.prompt_tokens]),
            0,
            s.tokens_T[s.prompt_tokens :],
            s.logprobs_R,
            "",
            "eos",
            0,
        )
        for s in sequences
    ]


def test_learning_against_bare_forward_and_backward_passes(config: Config) -> None:
    updates = [sequences(48), sequences(48)]
    written = [rollout for update in updates for rollout in rollouts(update)]
    with build.learners(config, str(config.model.path), None) as group:
        group.annotate([])
        passes, _ = bare(config, packed(updates, 2048), models=2)
        update, annotate, alone = timed_in_turn(
            3,
            lambda: group.update(updates, COEFFICIENTS),
            lambda: group.annotate(written),
            passes,
        )
    assert update < 2 * alone, (update, alone)
    assert annotate < alone, (annotate, alone)  # reference and critic forward: a third of it


def test_generating_against_the_engine_alone(config: Config) -> None:
    sampling = Sampling(1.0, 40, 0, "train")
    prompts = [Prompt(f"p:{n}", "verifiable", "", np.arange(3, 11)) for n in range(32)]
    chunks = [
        Chunk(0, n, 0, tuple(Request(prompt, (0, 1)) for prompt in prompts[n::2]), sampling)
        for n in range(2)
    ]
    path = str(config.model.path)
    engine = engines.engine(config, path, "cpu")()
    with build.rollout_pool(config, path) as (pool, _):
        pooled, alone = timed_in_turn(
            3,
            lambda: pool.collect(pool.submit(chunks)),
            lambda: [engine.generate(chunk) for chunk in chunks],
        )
    assert pooled < 1.5 * alone, (pooled, alone)
