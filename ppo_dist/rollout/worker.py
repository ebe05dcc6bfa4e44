"""A rollout worker: an engine and the receiver of its weights. A plain class; cluster/ makes it a
Ray actor.
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from ppo_dist import device
from ppo_dist.config import Config
from ppo_dist.models.policy import load_policy, stop_tokens
from ppo_dist.protocols import WeightReceiver
from ppo_dist.rollout.hf import HfEngine
from ppo_dist.types import Chunk, Rollout, Weights


class RolloutWorker:
    """Generates chunks with whichever version was loaded last."""

    def __init__(
        self, config: Config, model_path: str, receiver: WeightReceiver, kind: device.DeviceKind
    ) -> None:
        torch_device = device.prepare(kind, config.rollout.threads)
        self._receiver = receiver
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, trust_remote_code=config.model.trust_remote_code
        )
        dtype = device.DTYPES[config.learner.dtype]
        lm = load_policy(model_path, dtype, config.model.trust_remote_code)
        self._engine = HfEngine(lm, tokenizer, stop_tokens(model_path, tokenizer), torch_device)

    def load(self, weights: Weights) -> int:
        """Fetches and loads a version; returns its number."""
        self._engine.load(weights.version, self._receiver.fetch(weights))
        return weights.version

    def generate(self, chunk: Chunk) -> list[Rollout]:
        """See RolloutEngine."""
        with torch.inference_mode():
            return self._engine.generate(chunk)
