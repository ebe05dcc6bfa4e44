"""The same PPO iteration by TRL's PPOTrainer, where there is a TRL that has one. Nothing of
ppo_dist is used; the prompts are those that ours had.

Its own are: bf16 as autocast in training alone, so it writes with fp32 weights; logits of every
position; no clipping of gradients.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.bench.work import KL, LR, Found, Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Watch(TrainerCallback):
    """Seconds of each step (the first also of what comes before it); tokens with the prompts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.begin, self.count = time.perf_counter(), 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.begin)
        self.tokens.append(self.count)
        self.begin, self.count = now, 0

    def scored(self, _: torch.nn.Module, __: Any, given: dict[str, Any]) -> None:
        """A hook of the reward model, which gets every response once, up to its end."""
        self.count += int(given["attention_mask"].sum())


def config(work: Work, folder: Path) -> PPOConfig:
    """One epoch as ours and the plain program's: no checkpoint, no evaluation, no report."""
    return PPOConfig(
        output_dir=str(folder),
        total_episodes=(work.iterations + 1) * work.sequences,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=work.sequences // work.micro_batch,
        local_rollout_forward_batch_size=work.sequences,  # writing is the faster, the wider
        num_mini_batches=work.minibatches,
        num_ppo_epochs=1,
        response_length=work.max_new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=KL,
        vf_coef=0.5,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.01,
        bf16=work.dtype == "bf16",
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def run(work: Work, model: Path, reward: Path, prompts: Path) -> Found:
    """Medians of whole iterations after a first one that does not count and is no smaller, since
    TRL knows one size; `prompts` is a file of those of each iteration, as tokens.
    """
    torch.manual_seed(0)
    # with transformers 5 this is how TRL's Accelerator hears of it
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if work.dtype == "fp32" else work.dtype
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    # TRL tells padding by its token, so it must not be one that ends a turn
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})

    def loaded(kind: Any, path: Path, dtype: torch.dtype, **more: Any) -> Any:
        made = kind.from_pretrained(path, dtype=dtype, **more)
        made.resize_token_embeddings(max(len(tokenizer), made.config.vocab_size))
        return made

    policy = loaded(AutoModelForCausalLM, model, torch.float32)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    judge = loaded(AutoModelForSequenceClassification, reward, DTYPES[work.dtype])
    watch = Watch()
    judge.base_model.register_forward_pre_hook(watch.scored, with_kwargs=True)
    _, *asked = json.loads(prompts.read_text())["prompts"]
    rows = [[p for p in batch for _ in range(work.responses)] for batch in (asked[0], *asked)]
    trainer = PPOTrainer(
        config(work, prompts.parent / "trl"),
        tokenizer,
        policy,
        ref_model=loaded(AutoModelForCausalLM, model, DTYPES[work.dtype]),
        reward_model=judge,
        train_dataset=rows[0],
        value_model=loaded(AutoModelForSequenceClassification, model, torch.float32, num_labels=1),
        callbacks=[watch],
    )
    # its loader shuffles
    trainer.dataloader = [tokenizer.pad({"input_ids": r}, return_tensors="pt") for r in rows]
    # an update for each minibatch: it accumulates over all of them otherwise
    trainer.accelerator.gradient_accumulation_steps //= work.minibatches
    trainer.train()
    given = [sum(len(prompt) for prompt in batch) for batch in rows]
    new = [tokens - before for tokens, before in zip(watch.tokens, given, strict=True)]
    return Found({"step": statistics.median(watch.seconds[1:])}, statistics.median(new[1:]))
