"""All shipped implementations, and the fakes, through the contract suites."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from ppo_dist import build
from ppo_dist.config import Config
from ppo_dist.config.algorithm import Algorithm
from ppo_dist.config.reward import VoteReward
from ppo_dist.config.semi import Semi
from ppo_dist.coordinator.experience import Experience, supervised
from ppo_dist.data.chunks import chunks
from ppo_dist.models.policy import load_policy
from ppo_dist.protocols import Tracker
from ppo_dist.rewards.vote import MajorityVote
from ppo_dist.rollout.hf import HfEngine
from ppo_dist.semi.schedule import Scheduled
from ppo_dist.tracking.console import Several, Terminal
from ppo_dist.tracking.local import JsonLines
from ppo_dist.tracking.wandb import Wandb
from ppo_dist.transport.collective import CollectiveReceiver, CollectiveSender
from ppo_dist.transport.disk import DiskReceiver, DiskSender
from ppo_dist.transport.memory import MemoryReceiver, MemorySender
from ppo_dist.transport.store import StoreReceiver, StoreSender
from ppo_dist.types import (
    Checker,
    LabelledExample,
    Prompt,
    Rollout,
    Sampling,
    Score,
    Scored,
    Weights,
)
from tests.conftest import raw_config
from tests.contract import suites
from tests.fakes import FakeEngine, FakeLearners, FakePool, FakeReward, FakeTracker

PROMPTS = [Prompt(f"p:{i}", "verifiable", "", np.arange(3, 5 + i)) for i in range(4)]
CHUNKS = chunks(PROMPTS, 3, 5, 2, version=5, sampling=Sampling(1.0, 8, 0, "train"))


def test_fake_engine() -> None:
    suites.check_rollout_engine(FakeEngine(), {}.items(), CHUNKS)


def test_hf_engine(tiny_model: Path) -> None:
    model = load_policy(str(tiny_model), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    engine = HfEngine(model, tokenizer, frozenset({1}), torch.device("cpu"))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    suites.check_rollout_engine(engine, weights.items(), CHUNKS)


def twelve(prompt: str, response: str, answer: str | None) -> float:
    """A reward function of a user's own."""
    return float("12" in response and answer == "12" and prompt == "21>")


def rollouts() -> list[Rollout]:
    checker = Checker(
        "spell_backward", {}, {"question": "q", "answer": "12", "metadata": {"word": "21"}}
    )
    prompt = Prompt("p", "verifiable", "21>", np.array([3]), answer="12", checker=checker)
    return [
        Rollout(prompt, i, np.array([4, 1]), np.zeros(2, np.float32), text, "eos", 0)
        for i, text in enumerate(["12", "", " 12 ", "no", "1,2", "twelve 12", "\0\n"])
    ]


@pytest.mark.parametrize(
    "reward",
    [
        "exact",
        "numeric",
        "reasoning_gym",
        "math",
        {"kind": "function", "path": __file__, "name": "twelve"},
        {"kind": "regex", "pattern": "^1"},
        {"kind": "weighted", "parts": [{"weight": 0.5, "reward": "exact"}]},
    ],
    ids=str,
)  # fmt: skip
def test_rewards(tmp_path: Path, reward: object) -> None:
    config = Config.model_validate(raw_config(tmp_path, reward={"verifiable": reward}))
    source = build.reward_source(config)
    suites.check_reward_source(source, rollouts())
    assert source.score(rollouts())[0].value > 0


@pytest.mark.parametrize(
    "gate",
    [
        "all",
        {"kind": "confidence", "share": 0.6},
        {"kind": "trajectory", "window": 1, "warmup": 2, "top": 0.5},
    ],
    ids=str,
)
def test_gates(gate: object) -> None:
    section = Semi.model_validate({"gate": gate}).gate
    vote = MajorityVote(VoteReward(kind="vote"), "error")
    steps = []
    for step in range(8):
        drawn = np.random.default_rng(step)
        made = [
            replace(r, prompt=Prompt(f"{origin}{i}", origin, "", np.array([3])), text=text)
            for i, origin in enumerate(["labelled", "unlabelled", "unlabelled"])
            for r, text in zip(rollouts(), drawn.choice(["7", "8", "9"], 7), strict=True)
        ]
        steps.append([Scored(r, s) for r, s in zip(made, vote.score(made), strict=True)])
    suites.check_gate(build.gate(section), build.gate(section), steps)


def test_fake_reward() -> None:
    suites.check_reward_source(FakeReward(), rollouts())


@pytest.mark.parametrize(
    "schedule",
    [
        0.2,
        {"kind": "linear", "start": 1, "end": 0, "steps": 5},
        {"kind": "cosine", "peak": 1, "floor": 0.1, "warmup": 3, "steps": 6},
        {"kind": "supervised_first", "steps": 8, "then": 0.5},
        {"kind": "adaptive", "start": 0.5, "low": 0.1, "high": 1},
    ],
    ids=str,
)  # fmt: skip
def test_schedules(tmp_path: Path, schedule: object) -> None:
    raw = raw_config(tmp_path, mix={"schedule": schedule}, eval={"every": 1})
    config = Config.model_validate(raw)
    suites.check_mix_schedule(Scheduled(config.mix), Scheduled(config.mix))


@pytest.mark.parametrize("kind", ["fake", "jsonl", "terminal", "wandb", "several"])
def test_trackers(tmp_path: Path, kind: str) -> None:
    config = Config.model_validate(raw_config(tmp_path, tracking={"wandb": "offline"}))
    made: dict[str, Tracker] = {"fake": FakeTracker()}
    if kind in ("jsonl", "several"):
        made["jsonl"] = JsonLines(tmp_path, None)
    if kind == "terminal":
        made["terminal"] = Terminal(Console(quiet=True), 2, 0)
    if kind == "wandb":
        made["wandb"] = Wandb(config, tmp_path, resume=False)
    tracker = Several(list(made.values())) if kind == "several" else made[kind]
    suites.check_tracker(tracker)
    if kind in ("jsonl", "several"):
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert rows == [
            {"step": 0, "policy/loss": None, "semi/mu": 0.5},
            {"step": 1, "policy/loss": 0.25, "semi/mu": 0.5},
        ]
        samples = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["response"] for line in samples] == ["b", "d"]
    if kind == "wandb":
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")), "an offline file is there"


def test_a_long_runs_table_is_sent_at_most_a_hundred_times(tmp_path: Path) -> None:
    """W&B shows no more of a table that grows."""
    raw = raw_config(tmp_path, tracking={"wandb": "offline"}, train={"steps": 1000})
    tracker = Wandb(Config.model_validate(raw), tmp_path, resume=False)
    for step in range(1001):
        tracker.table(step, [{"response": str(step)}])
    tracker.close()
    files = list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"))
    assert 50 < len(files) <= 100
    rows = [row for file in files for row in json.loads(file.read_text())["data"]]
    assert sorted(rows) == [[step, str(step)] for step in range(1001)]


def test_memory_transport() -> None:
    suites.check_transport(MemorySender(), [MemoryReceiver(), MemoryReceiver()])


def test_store_transport(ray_session: None) -> None:
    # one byte a bucket: every tensor travels alone
    suites.check_transport(StoreSender(bucket_bytes=1), [StoreReceiver(), StoreReceiver()])
    suites.check_transport(StoreSender(bucket_bytes=2**20), [StoreReceiver()])


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_disk_transport(tmp_path: Path, bucket_bytes: int) -> None:
    sender = DiskSender(tmp_path, bucket_bytes, keep=2)
    suites.check_transport(sender, [DiskReceiver(), DiskReceiver()])
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["version-00000002", "version-00000003"]


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_collective_transport(bucket_bytes: int) -> None:
    sender = CollectiveSender("cpu", bucket_bytes, deadline_s=10.0)
    receivers = [CollectiveReceiver("cpu", "127.0.0.1", sender.port, 10.0, 3) for _ in range(2)]
    suites.check_transport(sender, receivers)


@pytest.mark.parametrize("kind", ["gae", "group_mean", "rloo", "reinforce_pp"])
def test_advantage_estimators(kind: str) -> None:
    algorithm = Algorithm.model_validate({"advantage": kind})
    suites.check_advantage_estimator(build.advantage_estimator(algorithm.advantage))


def test_pools(tmp_path: Path, tiny_model: Path) -> None:
    config = Config.model_validate(raw_config(tmp_path, rollout={"max_new_tokens": 8}))
    suites.check_rollout_pool(FakePool(), Weights(5, ()), Weights(6, ()), CHUNKS)
    model, sender = load_policy(str(tiny_model), torch.float32), MemorySender()
    older = sender.publish(5, model.named_parameters())
    newer = sender.publish(6, ((n, -p) for n, p in model.named_parameters()))
    with build.rollout_pool(config, str(tiny_model)) as (pool, _):
        suites.check_rollout_pool(pool, older, newer, CHUNKS)


@pytest.mark.parametrize("kind", ["fake", "in process"])
def test_learner_groups(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    config = Config.model_validate(raw_config(tmp_path))
    scored = [Scored(r, Score(1.0, "s")) for r in rollouts()]
    with build.learners(config, str(tiny_model), None) as real:
        learners = FakeLearners() if kind == "fake" else real
        estimator = build.advantage_estimator(config.algorithm.advantage)
        sequences = Experience(config.algorithm, estimator)(
            scored, learners.annotate([s.rollout for s in scored]), True
        )
        example = supervised(LabelledExample(PROMPTS[0], "x", np.array([5, 1])))
        updates = [[*sequences, example], [example]]
        suites.check_learner_group(learners, rollouts(), updates, tmp_path / "saved")


def test_ray_pool_and_learners(
    ray_session: None, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """Two workers of each."""
    two = {"workers": 2}
    raw = raw_config(tmp_path, cluster={"kind": "ray"}, learner=two, rollout=two)
    config, folder = build.located(Config.model_validate(raw)), str(tiny_models["gpt2"])
    example = supervised(LabelledExample(PROMPTS[0], "x", np.array([5, 1])))
    with (
        build.cluster(config) as settled,
        build.workers(settled, folder, None) as (learners, pool, _),
    ):
        assert (config.cluster.device, settled.cluster.device) == ("auto", "cpu"), "for good"
        suites.check_rollout_pool(pool, learners.publish(5), learners.publish(6), CHUNKS)
        suites.check_learner_group(learners, rollouts(), [[example], []], tmp_path / "saved")
