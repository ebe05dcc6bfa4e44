"""The same PPO iteration as a plain program: transformers' `generate`, padding, full logits, bf16
autocast over fp32 weights, torch's fused AdamW. Nothing of ppo_dist is used; the prompts are those
that ours had, and each response ends after as many tokens as ours did, so that both do equal work.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    StoppingCriteria,
)

from tests.bench.work import KL, LR, Found, Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GAMMA, LAM, CLIP, VALUE_CLIP = 1.0, 0.95, 0.2, 0.2


class Ends(StoppingCriteria):
    """Ends each response of a batch at a length of its own."""

    def __init__(self, width: int, lengths_B: torch.Tensor) -> None:
        self.widths_B = width + lengths_B

    def __call__(self, tokens_BL, scores, **_):  # type: ignore[no-untyped-def]
        return tokens_BL.shape[1] >= self.widths_B


class Plain:
    """Four models and two optimizers."""

    def __init__(self, work: Work, model: Path, reward: Path, prompts: Path) -> None:
        self.work, dtype = work, DTYPES[work.dtype]
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.writer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        shape = AutoConfig.from_pretrained(model, num_labels=1, classifier_dropout=0.0)
        self.critic = AutoModelForTokenClassification.from_pretrained(
            model, config=shape, dtype=torch.float32
        )
        self.reward = AutoModelForSequenceClassification.from_pretrained(reward, dtype=dtype).eval()
        for module in (self.policy, self.critic):
            module.train()
        self.optimizers = [
            torch.optim.AdamW(m.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)
            for m in (self.policy, self.critic)
        ]
        self.asked: dict[str, list[list[Any]]] = json.loads(prompts.read_text())
        self.seconds: dict[str, float] = defaultdict(float)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.work.dtype == "bf16")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin

    def iteration(self, number: int) -> int:
        """One PPO iteration; returns the number of new tokens."""
        rows = {"input_ids": self.asked["prompts"][number]}
        lengths_B = torch.tensor(self.asked["lengths"][number])
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        width = batch.input_ids.shape[1]
        with self.timed("generate"), torch.no_grad():
            for mine, master in zip(
                self.writer.parameters(), self.policy.parameters(), strict=True
            ):
                mine.copy_(master)
            tokens = self.writer.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=self.work.max_new_tokens,
                num_return_sequences=self.work.responses,
                eos_token_id=-1,  # none
                stopping_criteria=[Ends(width, lengths_B)],
            )
        live = torch.arange(tokens.shape[1] - width) < lengths_B[:, None]
        prompt_mask = batch.attention_mask.repeat_interleave(self.work.responses, 0).bool()
        mask = torch.cat([prompt_mask, live], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        columns = (tokens, mask, positions, live)
        with self.timed("score"), torch.no_grad():
            scores = torch.cat([self.judge(*part) for part in self.parts(columns)])
        with self.timed("annotate"), torch.no_grad():
            found = [self.annotate(*part) for part in self.parts(columns)]
            old, reference, values = (torch.cat(column) for column in zip(*found, strict=True))
        advantages, returns = self.advantages(scores, old, reference, values, live)
        rows = (*columns, old, values, advantages, returns)
        with self.timed("update"):
            for part in torch.randperm(len(tokens)).chunk(self.work.minibatches):
                self.update([column[part] for column in rows])
        return int(live.sum())

    def parts(self, columns: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
        return zip(*(column.split(self.work.micro_batch) for column in columns), strict=True)

    def judge(self, tokens, mask, positions, live):  # type: ignore[no-untyped-def]
        trunk = self.reward.model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        )
        ends = tokens.shape[1] - live.shape[1] + live.sum(1) - 1
        return self.reward.score(trunk.last_hidden_state[torch.arange(len(tokens)), ends])[:, 0]

    def logprobs(self, model, tokens, mask, positions, live):  # type: ignore[no-untyped-def]
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logits = logits[:, -live.shape[1] - 1 : -1].float()
        taken = tokens[:, -live.shape[1] :, None]
        return logits.log_softmax(-1).gather(-1, taken)[..., 0] * live

    def values(self, tokens, mask, positions, live):  # type: ignore[no-untyped-def]
        out = self.critic(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.logits[:, -live.shape[1] - 1 : -1, 0].float() * live

    def annotate(self, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self.autocast():
            old, values = self.logprobs(self.policy, *columns), self.values(*columns)
        return old, self.logprobs(self.reference, *columns), values

    def advantages(self, scores, old, reference, values, live):  # type: ignore[no-untyped-def]
        rewards = -KL * (old - reference)
        rewards[torch.arange(len(live)), live.sum(1) - 1] += scores.float()
        advantages, after = torch.zeros_like(values), torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            follows = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(values))
            delta = rewards[:, t] + GAMMA * follows - values[:, t]
            after = (delta + GAMMA * LAM * after) * live[:, t]
            advantages[:, t] = after
        returns = advantages + values
        flat = advantages[live]
        return (advantages - flat.mean()) / (flat.std() + 1e-8) * live, returns

    def update(self, rows: list[torch.Tensor]) -> None:
        count = rows[3].sum()
        for part in zip(*(row.split(self.work.micro_batch) for row in rows), strict=True):
            tokens, mask, positions, live, old, old_values, advantages, returns = part
            with self.autocast():
                new = self.logprobs(self.policy, tokens, mask, positions, live)
                values = self.values(tokens, mask, positions, live)
            ratio = (new - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = (torch.maximum(-ratio * advantages, -clipped * advantages) * live).sum() / count
            bounded = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
            worst = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
            (loss + 0.5 * (worst * live).sum() / count).backward()
        for model, optimizer in zip((self.policy, self.critic), self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def run(work: Work, model: Path, reward: Path, prompts: Path) -> Found:
    """Medians after a first iteration that does not count; `prompts` is a file of those of each
    iteration, as tokens, and of the lengths of the responses.
    """
    torch.manual_seed(0)
    program, rows, tokens = Plain(work, model, reward, prompts), [], []
    for number in range(work.iterations + 1):
        program.seconds.clear()
        with program.timed("step"):
            tokens.append(program.iteration(number))
        rows.append(dict(program.seconds))
    names = rows[1]
    seconds = {name: statistics.median(row[name] for row in rows[1:]) for name in names}
    return Found(seconds, statistics.median(tokens[1:]))
