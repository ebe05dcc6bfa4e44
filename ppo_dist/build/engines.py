"""What writes responses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ppo_dist.config import Config
from ppo_dist.config.workers import HfEngine, VllmEngine
from ppo_dist.protocols import RolloutEngine

if TYPE_CHECKING:
    from ppo_dist.device import DeviceKind


def engine(config: Config, model_path: str, kind: DeviceKind) -> Callable[[], RolloutEngine]:
    """Makes the engine, in the process that generates, with the model as it is on disk."""
    match config.rollout.engine:
        case HfEngine():
            return functools.partial(_hf, config, model_path, kind)
        case VllmEngine():
            return functools.partial(_vllm, config, model_path, kind)


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


def _vllm(config: Config, model_path: str, kind: DeviceKind) -> RolloutEngine:
    from ppo_dist.rollout.vllm import VllmEngine

    made: RolloutEngine = VllmEngine(config, model_path, kind)
    return made
