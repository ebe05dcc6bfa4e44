"""The policy as a Hugging Face folder: how it is written, and out of a checkpoint's files alone, so
that whoever exports needs memory for the weights but neither the run's cluster nor DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ppo_dist import files
from ppo_dist.config import Config
from ppo_dist.device import DTYPES
from ppo_dist.learner import shards
from ppo_dist.models.lora import add_adapters, merged
from ppo_dist.models.policy import load_policy

LM = "lm."  # how the names of the language model's parameters begin in a learner


def export(config: Config, model_path: str, checkpoint: Path, folder: Path) -> None:
    """Writes what the learners of the run would write: weights in the run's number format, adapters
    merged (in bf16 rounded by other lots than on a GPU).

    Raises:
        InputError: a file of the checkpoint is missing or cannot be read, or is of another model.
    """
    trust = config.model.trust_remote_code
    dtype = DTYPES[config.learner.dtype]
    lm = load_policy(model_path, dtype, trust).to(dtype)  # all of it, as DeepSpeed has it
    if config.model.lora is not None:
        add_adapters(lm, config.model.lora, config.run.seed)
    pieces = [
        shards.Piece(LM + name, 0, p.numel(), p.numel(), p, 0)
        for name, p in lm.named_parameters()
        if p.requires_grad
    ]
    shards.read(checkpoint / "policy", pieces)
    named = ((name, p.detach()) for name, p in lm.named_parameters())
    write(folder, lm, dict(merged(lm, named)), model_path, trust)


def write(
    folder: Path,
    lm: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer_path: str,
    trust_remote_code: bool,
) -> None:
    """Writes config, weights and tokenizer, all or nothing."""
    with files.aside(folder) as made:
        lm.save_pretrained(made, state_dict=state)
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_path, trust_remote_code=trust_remote_code
        )
        tokenizer.save_pretrained(made)
