"""Reward models: sequence classification with one output."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_dist import device
from ppo_dist.config.reward import ModelReward
from ppo_dist.data.batching import pack_rows, shares
from ppo_dist.models.packing import ATTENTION, Packing
from ppo_dist.models.policy import hidden, without_dropout
from ppo_dist.reports import Vitals
from ppo_dist.types import Ints, Rollout, Score
from ppo_dist.vitals import Pulse


@dataclass(frozen=True, eq=False)
class Exchange:
    """A prompt and a response as a reward model may read them.

    Example: Exchange(prompt_P=[8, 5, 3], response_R=[5, 8, 1], prompt="he>", response="eh")
    """

    prompt_P: Ints
    response_R: Ints
    prompt: str
    response: str


@dataclass(frozen=True)
class Traces:
    """Where worker `number` (all models' workers are counted) writes torch traces, of as many calls
    after its first.

    Example: Traces(folder=Path("runs/sums/profile"), number=0, calls=2)
    """

    folder: Path
    number: int
    calls: int

    def of(self, call: int) -> contextlib.AbstractContextManager[None]:
        """Around a call."""
        if not 1 <= call <= self.calls:
            return contextlib.nullcontext()
        return device.traced(self.folder / f"reward-{self.number}-{call}.json")


Judgement = tuple[list[list[float]], Vitals]  # numbers by batch, and what the worker took for them
Judge = Callable[[list[list[list[Exchange]]]], list[Judgement]]


class ModelScores:
    """A RewardSource: cuts a step's responses into as many shares as the model has workers, and
    has each judged there.
    """

    def __init__(self, section: ModelReward, judge: Judge) -> None:
        """`judge` takes exchanges by worker and batch and answers in the same order."""
        self._section, self._judge = section, judge
        self._vitals = [Vitals()] * section.workers

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """See RewardSource."""
        if not rollouts:
            return []
        exchanges = [
            Exchange(r.prompt.tokens_P, r.tokens_R, r.prompt.text, r.text) for r in rollouts
        ]
        rows = [(np.concatenate([e.prompt_P, e.response_R]), len(e.prompt_P)) for e in exchanges]
        parts = shares(rows, self._section.workers, self._section.batch_tokens)
        parts = [[members for members in part if members] for part in parts]
        answers = self._judge([[[exchanges[i] for i in batch] for batch in part] for part in parts])
        self._vitals = [
            before + new for before, (_, new) in zip(self._vitals, answers, strict=True)
        ]
        values = {
            i: value
            for part, (answer, _) in zip(parts, answers, strict=True)
            for members, found in zip(part, answer, strict=True)
            for i, value in zip(members, found, strict=True)
        }
        return [Score(values[i], "model") for i in range(len(rollouts))]

    def vitals(self) -> list[Vitals]:
        """Of each worker, since this was last asked."""
        told, self._vitals = self._vitals, [Vitals()] * self._section.workers
        return told


class RewardModel:
    """The model and its tokenizer in one process. A causal model reads packed rows, responses to
    one prompt sharing its tokens, and is asked at the last token; any other reads a padded table of
    (prompt, response) pairs.
    """

    def __init__(
        self, section: ModelReward, policy_path: str, kind: device.DeviceKind, traces: Traces
    ) -> None:
        """
        Raises:
            ValueError: the model has not exactly one output.
        """
        self._traces, self._calls = traces, 0
        self._device, self._pulse = device.prepare(kind, section.threads), Pulse()
        self._tokenizer = AutoTokenizer.from_pretrained(section.path, trust_remote_code=False)
        policy = AutoTokenizer.from_pretrained(policy_path, trust_remote_code=False)
        self._reads_tokens = self._tokenizer.get_vocab() == policy.get_vocab()
        model = AutoModelForSequenceClassification.from_pretrained(
            section.path,
            dtype=device.DTYPES[section.dtype],
            use_safetensors=True,
            trust_remote_code=False,
        )
        if model.config.num_labels != 1:
            raise ValueError(f"{section.path}: has {model.config.num_labels} outputs, not one")
        without_dropout(model)
        self._model = model.to(self._device).eval()
        head = dict(model.named_children()).get("score")  # of causal models alone
        self._head = head if isinstance(head, nn.Linear) else None
        if self._head is not None:
            model.set_attn_implementation(ATTENTION)
        if section.compile:
            from ppo_dist.models.compiled import compile_layers  # torch's compiler loads slowly

            device.before_compiling(kind)
            compile_layers(model.base_model)

    @torch.inference_mode()
    def judge(self, batches: list[list[Exchange]]) -> Judgement:
        """The number of each exchange, batch by batch, and what they took."""
        begin = time.perf_counter()
        read = self._packed if self._head is not None else self._padded
        with self._traces.of(self._calls):
            values = [read(batch) for batch in batches]
        self._calls += 1
        self._pulse.add(time.perf_counter() - begin)
        return values, self._pulse.vitals()

    def _packed(self, batch: list[Exchange]) -> list[float]:
        assert self._head is not None
        rows = [self._row(exchange) for exchange in batch]
        ends = np.cumsum([len(tokens_T) - prompt + 1 for tokens_T, prompt in rows]) - 1
        row = pack_rows(rows, end=True)
        columns = (row.tokens_S, row.positions_S, row.slots_N, row.home_S, row.states_K[ends])
        tokens_S, positions_S, slots_N, home_S, ends_B = (
            torch.from_numpy(column).to(self._device) for column in columns
        )
        packing = Packing(slots_N, home_S, row.shapes)
        hidden_BH = hidden(self._model.base_model, tokens_S, positions_S, packing, ends_B)
        values: list[float] = self._head(hidden_BH)[:, 0].float().tolist()
        return values

    def _row(self, exchange: Exchange) -> tuple[Ints, int]:
        prompt_P, response_R = exchange.prompt_P, exchange.response_R
        if not self._reads_tokens:
            prompt_P = np.array(self._tokenizer(exchange.prompt)["input_ids"], np.int64)
            response = self._tokenizer(exchange.response, add_special_tokens=False)["input_ids"]
            response_R = np.array([*response, self._tokenizer.eos_token_id], np.int64)
        return np.concatenate([prompt_P, response_R]), len(prompt_P)

    def _padded(self, batch: list[Exchange]) -> list[float]:
        prompts, responses = [e.prompt for e in batch], [e.response for e in batch]
        table = self._tokenizer(
            prompts,
            responses,
            padding=True,
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        values: list[float] = self._model(**table.to(self._device)).logits[:, 0].float().tolist()
        return values
