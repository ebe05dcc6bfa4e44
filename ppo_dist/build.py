"""The composition root: a config becomes parts. The only place that chooses by `kind`.

`check` reads and judges everything that can be wrong without loading a model; `assembled` starts
the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppo_dist.config import ORIGINS, Config, InputError, Origin, sees_answer
from ppo_dist.config.algorithm import AnyAdvantage, Gae, GroupMean, ReinforcePlusPlus, Rloo
from ppo_dist.config.reward import (
    AnyReward,
    ExactReward,
    FunctionReward,
    GymReward,
    MathReward,
    NumericReward,
    RegexReward,
    VoteReward,
    WeightedReward,
)
from ppo_dist.config.semi import AllGate, AnyGate, ConfidenceGate, TrajectoryGate
from ppo_dist.data.partition import parted, refuse_overlap, without_answer
from ppo_dist.data.sources import Row, read
from ppo_dist.protocols import AdvantageEstimator, Gate, LearnerGroup, RewardSource, RolloutPool

if TYPE_CHECKING:
    from ppo_dist.device import DeviceKind


@dataclass(frozen=True)
class Rows:
    """All data of a run as rows, already checked.

    Example: Rows(prompts={"labelled": [...], "verifiable": [...]}, held_out=[...], test=[...],
    probe=[])
    """

    prompts: Mapping[Origin, Sequence[Row]]
    held_out: Sequence[Row]
    test: Sequence[Row]
    probe: Sequence[Row]


def check(config: Config) -> Rows:
    """Reads all data and looks at the model folder, without loading a model.

    Raises:
        InputError: something is missing or wrong; names file, row or key.
    """
    for path in (config.model.path, config.reference.path, config.critic.path):
        if path is not None:
            check_model(path)
    reward_source(config)  # says what is wrong with a pattern
    rewards = dict(config.reward)
    prompts: dict[Origin, Sequence[Row]] = {
        origin: read(dict(config.data)[origin], origin, origin, _compares(rewards[origin]))
        for origin in ORIGINS
    }
    compares = _compares(config.reward.labelled)
    held_out = read(config.data.held_out, "held_out", "labelled", compares)
    test = read(config.data.test, "test", "labelled", compares)
    for name, rows in (("held_out", held_out), ("test", test)):
        for origin in ORIGINS:
            refuse_overlap(name, rows, origin, prompts[origin])
    prompts["labelled"], probe = parted(prompts["labelled"], config.semi.probe, config.run.seed)
    prompts["unlabelled"] = [*prompts["unlabelled"], *map(without_answer, probe)]
    return Rows(prompts, held_out, test, probe)


def _compares(reward: AnyReward | None) -> bool:
    return reward is not None and sees_answer(reward)


def check_model(path: str) -> None:
    """Whether a path is a Hugging Face folder with safetensors, or could be a hub name.

    Raises:
        InputError: it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        for what, pattern in (
            ("config.json", "config.json"),
            ("safetensors weights", "*.safetensors"),
            ("tokenizer", "tokenizer*"),
        ):
            if not any(folder.glob(pattern)):
                raise InputError(f"{path}: is not a model folder: it has no {what}")
    elif folder.exists() or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such model folder")
    elif not _on_hub(path):
        raise InputError(
            f"{path}: no such model folder, and no model of that name could be had from the hub"
        )


def _on_hub(name: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "ON", "YES"):
            return False
        return HfApi().model_info(name, timeout=5) is not None
    except HFValidationError:
        return False
    except Exception:  # no network, no such model, no access: each means that it cannot be had
        return False


def located(config: Config) -> Config:
    """The same config with absolute folders: workers may run in another working directory."""
    moved = {"run": config.run.model_copy(update={"dir": str(Path(config.run.dir).resolve())})}
    for name in ("model", "reference", "critic"):
        section = dict(config)[name]
        if section.path is not None and Path(section.path).is_dir():
            path = str(Path(section.path).resolve())
            moved[name] = section.model_copy(update={"path": path})
    return config.model_copy(update=moved)


# ── rewards and other pure parts ──────────────────────────────────────────────────────────────────


def reward_source(config: Config) -> RewardSource:
    """The reward of every origin that has one."""
    from ppo_dist.rewards.rules import ByOrigin

    sections = dict(config.reward)
    return ByOrigin(
        {
            o: _reward(sections[o], config.reward.on_error)
            for o in ORIGINS
            if sections[o] is not None
        }
    )


def _reward(section: AnyReward, on_error: Literal["error", "zero"]) -> RewardSource:
    from ppo_dist.rewards.gym import gym
    from ppo_dist.rewards.rules import (
        Judged,
        WeightedSum,
        exact,
        function,
        mathematics,
        numeric,
        regex,
    )
    from ppo_dist.rewards.vote import MajorityVote

    match section:
        case ExactReward():
            judge = exact(section)
        case NumericReward():
            judge = numeric(section)
        case MathReward():
            judge = mathematics
        case RegexReward():
            judge = regex(section)
        case FunctionReward():
            judge = function(section)
        case VoteReward():
            return MajorityVote(section, on_error)
        case GymReward():
            judge = gym(section)
        case WeightedReward():
            return WeightedSum(
                [(part.weight, _reward(part.reward, on_error)) for part in section.parts]
            )
    return Judged(judge, section.kind, on_error)


def gate(section: AnyGate) -> Gate:
    """The gate that a config names."""
    from ppo_dist.semi import gate as gates

    match section:
        case AllGate():
            return gates.All()
        case ConfidenceGate():
            return gates.Confidence(section)
        case TrajectoryGate():
            return gates.Trajectory(section)


def advantage_estimator(section: AnyAdvantage) -> AdvantageEstimator:
    """The advantage estimator that a config names."""
    from ppo_dist.algo import advantages

    match section:
        case Gae():
            return advantages.Gae(section.gamma, section.lam)
        case GroupMean():
            return advantages.GroupMean(section.std)
        case Rloo():
            return advantages.Rloo()
        case ReinforcePlusPlus():
            return advantages.ReinforcePlusPlus(section.gamma)


# ── models and workers ────────────────────────────────────────────────────────────────────────────


def model_folder(config: Config, rows: Rows) -> str:
    """The initial policy's path; a model from scratch is made in the run folder, once."""
    if config.model.path is not None:
        return config.model.path
    from ppo_dist.files import replace
    from ppo_dist.models.scratch import make_model

    assert config.model.scratch is not None, "the schema demands one of the two"
    folder = Path(config.run.dir) / "model"
    if not folder.exists():
        every = [*[row for group in rows.prompts.values() for row in group], *rows.held_out]
        texts = [
            text
            for row in every
            for text in (row.prompt, row.response, row.answer)
            if isinstance(text, str)
        ]
        aside = folder.with_name(".model.writing")
        make_model(aside, config.model.scratch, texts, config.run.seed)
        replace(aside, folder)
    return str(folder)


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[None]:
    """Whatever the workers run on: a Ray connection, or nothing.

    Raises:
        InputError: the cluster cannot be joined, or is too small for a training run of this config.
    """
    if config.cluster.kind == "local":
        yield
        return
    from ppo_dist.cluster.session import demand, session

    with session(config.cluster):
        demand(config)
        yield


@contextlib.contextmanager
def learners(config: Config, model_path: str, resume: Path | None) -> Iterator[LearnerGroup]:
    """The learners, started inside `cluster`; from a checkpoint if one is given.

    Raises:
        InputError: the cluster has no room for them.
    """
    from ppo_dist.learner.group import InProcess, Learners

    budget, shared = config.learner.micro_batch_tokens, config.critic.shared
    if config.cluster.kind == "local":
        from ppo_dist.learner.worker import LearnerWorker, Seat
        from ppo_dist.transport.memory import MemorySender

        seat = Seat(0, 1, "127.0.0.1", _free_port(), _local_device(config))
        worker = LearnerWorker(config, model_path, MemorySender(), seat, resume)
        yield Learners(InProcess(worker), budget, shared)
        return
    from ppo_dist.cluster.groups import RayRanks
    from ppo_dist.cluster.session import places
    from ppo_dist.transport.store import StoreSender

    with places(config, config.learner.workers, config.learner.cpus) as reserved:
        sender = StoreSender(config.transport.bucket_mb * 2**20)
        yield Learners(RayRanks(config, model_path, sender, reserved, resume), budget, shared)


@contextlib.contextmanager
def rollout_pool(config: Config, model_path: str) -> Iterator[RolloutPool]:
    """The rollout workers, started inside `cluster` with the model as it is on disk (version 0).

    Raises:
        InputError: the cluster has no room for them.
    """
    if config.cluster.kind == "local":
        from ppo_dist.rollout.pool import InProcessPool
        from ppo_dist.rollout.worker import RolloutWorker
        from ppo_dist.transport.memory import MemoryReceiver

        receiver = MemoryReceiver()
        yield InProcessPool(RolloutWorker(config, model_path, receiver, _local_device(config)))
        return
    from ppo_dist.cluster.groups import RayPool
    from ppo_dist.cluster.session import places
    from ppo_dist.transport.store import StoreReceiver

    with places(config, config.rollout.workers, config.rollout.cpus) as reserved:
        yield RayPool(config, model_path, StoreReceiver(), reserved)


def _local_device(config: Config) -> DeviceKind:
    from ppo_dist import device

    return device.available() if config.cluster.device == "auto" else config.cluster.device


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
