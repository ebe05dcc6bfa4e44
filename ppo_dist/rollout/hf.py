"""The `hf` engine: our own decoding loop over a transformers model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ppo_dist.device import free_cache, peak_memory, traced
from ppo_dist.models.kernels import multiplier
from ppo_dist.models.packing import sliding_window
from ppo_dist.protocols import NamedTensors
from ppo_dist.rollout.sampling import draw, uniforms
from ppo_dist.rollout.slots import Slots
from ppo_dist.types import Bools, Chunk, Ints, Request, Rollout, Sampling

WORTH = 8  # tokens that all prompts must begin with for these to be read in a pass of their own
REFILL = 8  # new prompts are read when an eighth of the slots is free


class HfEngine:
    """Generates the sequences of a chunk, up to `slots` at a time: one that ends makes room for the
    next. A prompt is read once for all its responses.

    The random numbers of a response follow from (run seed, stream, step, prompt uid, response
    index) alone and what is computed together from the chunk alone, so tokens do not depend on
    which worker generates, nor on the order of chunks.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        device: torch.device,
        slots: int | None = None,
    ) -> None:
        """Without `slots` all sequences of a chunk are generated at the same time."""
        self._lm = lm.to(device).eval()
        self._tokenizer = tokenizer
        self._stops = np.array(sorted(stops))
        self._device = device
        self._slots = slots
        self._window: int | None = sliding_window(lm.config)
        self._version: int | None = 0  # the model as it was read from disk
        self._pack_head()

    def load(self, version: int, weights: NamedTensors) -> None:
        """Replaces every parameter.

        Raises:
            ValueError: the weights lack a parameter, have an unknown one, or one of another shape.
        """
        self._version = None  # until all of it is there
        targets = dict(self._lm.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                target = targets.pop(name, None)
                if target is None or target.shape != tensor.shape:
                    raise ValueError(
                        f"version {version}: no place for {name} of shape {tuple(tensor.shape)}"
                    )
                target.copy_(tensor)
        if targets:
            raise ValueError(f"version {version}: no weights for {', '.join(sorted(targets)[:3])}")
        self._pack_head()
        self._version = version

    def sleep(self) -> None:
        """See RolloutEngine."""
        self._lm.to("cpu")
        free_cache(self._device)

    def wake(self) -> None:
        """See RolloutEngine."""
        self._lm.to(self._device)
        self._pack_head()

    def peak_memory(self) -> int | None:
        """See RolloutEngine."""
        return peak_memory()

    def traced(self, file: Path) -> AbstractContextManager[None]:
        """See RolloutEngine."""
        return traced(file)

    def _pack_head(self) -> None:
        head = self._lm.get_output_embeddings()
        self._head = multiplier(head.weight, head.bias)

    @torch.inference_mode()
    def generate(self, chunk: Chunk) -> list[Rollout]:
        """See RolloutEngine.

        Raises:
            ValueError: the chunk asks for a version that is not loaded, or for sequences longer
                than the model's sliding window.
        """
        if chunk.version != self._version:
            raise ValueError(
                f"asked for version {chunk.version}, version {self._version} is loaded"
            )
        longest = max(len(request.prompt.tokens_P) for request in chunk.requests)
        if self._window is not None and longest + chunk.sampling.max_new_tokens > self._window:
            raise ValueError(f"sequences longer than a sliding_window of {self._window} tokens")
        wanted = [
            (request.prompt, index) for request in chunk.requests for index in request.indices
        ]
        numbers_WN = np.stack(
            [uniforms(chunk.sampling, chunk.step, prompt.uid, index) for prompt, index in wanted]
        )
        written = self._decode(chunk.requests, numbers_WN, chunk.sampling)
        return [
            Rollout(
                prompt=prompt,
                index=index,
                tokens_R=written.tokens_WN[w, : written.lengths_W[w]].copy(),
                logprobs_R=written.logprobs_WN[w, : written.lengths_W[w]].copy(),
                text=self._tokenizer.decode(
                    written.tokens_WN[w, : written.lengths_W[w]], skip_special_tokens=True
                ),
                finish="eos" if written.ended_W[w] else "length",
                version=chunk.version,
            )
            for w, (prompt, index) in enumerate(wanted)
        ]

    def _decode(
        self, requests: Sequence[Request], numbers_WN: np.ndarray, sampling: Sampling
    ) -> Written:
        """All responses, in order; W counts them."""
        written = Written.nothing(*numbers_WN.shape)
        begins = np.cumsum([0] + [len(request.indices) for request in requests])
        largest = max(len(request.indices) for request in requests)
        slots = min(len(numbers_WN), max(self._slots or len(numbers_WN), largest))
        cache, waiting = Slots(slots), deque(zip(requests, begins.tolist(), strict=False))
        who_B = np.full(slots, -1)  # the response in each slot, −1 in a free one
        logits_BV = self._refill(cache, who_B, waiting, None)
        while (who_B >= 0).any():
            at = np.flatnonzero(who_B >= 0)
            points = torch.from_numpy(numbers_WN[who_B[at], written.lengths_W[who_B[at]]])
            here = torch.from_numpy(at).to(self._device)
            drawn = draw(logits_BV[here], points.to(self._device), sampling)
            tokens, logprobs = (tensor.cpu().numpy() for tensor in drawn)
            ends = written.add(who_B[at], tokens, logprobs, np.isin(tokens, self._stops))
            who_B[at[ends]], cache.lengths_B[at[ends]] = -1, 0
            next_B = np.zeros(len(who_B), np.int64)
            next_B[at] = tokens
            if not waiting and 2 * (who_B >= 0).sum() <= len(who_B):
                kept = np.flatnonzero(who_B >= 0)
                cache.keep(kept)
                who_B, next_B = who_B[kept], next_B[kept]
            if len(who_B) and (who_B >= 0).any():
                logits_BV = self._step(cache, next_B)
                cache.lengths_B[who_B >= 0] += 1
            logits_BV = self._refill(cache, who_B, waiting, logits_BV)
        return written

    def _step(self, cache: Slots, tokens_B: Ints) -> torch.Tensor:
        """The logits after one more token in every slot."""
        positions, mask = cache.begin()
        out = self._lm.base_model(
            input_ids=torch.from_numpy(tokens_B).to(self._device)[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return self._head(out.last_hidden_state[:, -1])

    def _refill(
        self,
        cache: Slots,
        who_B: Ints,
        waiting: deque[tuple[Request, int]],
        logits_BV: torch.Tensor | None,
    ) -> torch.Tensor:
        """Puts waiting responses into free slots, if there are enough for it to be worth it."""
        free = np.flatnonzero(who_B < 0)
        worth = len(free) * REFILL >= len(who_B)
        taken: list[tuple[Request, int]] = []
        room = len(free)
        while waiting and worth and len(waiting[0][0].indices) <= room:
            taken.append(waiting.popleft())
            room -= len(taken[-1][0].indices)
        if not taken:
            assert logits_BV is not None, "the first request fits into the empty slots"
            return logits_BV
        counts = [len(request.indices) for request, _ in taken]
        row_of = np.repeat(np.arange(len(taken)), counts)
        slots = free[: len(row_of)]
        who_B[slots] = np.concatenate(
            [np.arange(begin, begin + n) for (_, begin), n in zip(taken, counts, strict=True)]
        )
        prompts = [request.prompt.tokens_P for request, _ in taken]
        prefilled, logits_QV = self._prefill(prompts)
        lengths = np.array([len(tokens_P) for tokens_P in prompts])
        cache.fill(slots, prefilled, row_of, lengths[row_of])
        if logits_BV is None or len(logits_BV) != len(who_B):
            logits_BV = logits_QV.new_zeros(len(who_B), logits_QV.shape[1])
        logits_BV[torch.from_numpy(slots).to(self._device)] = logits_QV[
            torch.from_numpy(row_of).to(self._device)
        ]
        return logits_BV

    def _prefill(self, prompts: Sequence[Ints]) -> tuple[DynamicCache, torch.Tensor]:
        """Cache and next-token logits of each prompt. What all begin with is read once; the rest is
        padded right, where no token of theirs looks.
        """
        cache, common = DynamicCache(), _common_beginning(prompts)
        if common >= WORTH and len(prompts) > 1:
            self._read(cache, prompts[0][None, :common])
            cache.batch_repeat_interleave(len(prompts))
        else:
            common = 0
        rest = [tokens_P[common:] for tokens_P in prompts]
        tokens_QP = np.zeros((len(rest), max(map(len, rest))), np.int64)
        for q, tokens_P in enumerate(rest):
            tokens_QP[q, : len(tokens_P)] = tokens_P
        hidden_QPD = self._read(cache, tokens_QP)
        lasts = torch.tensor([len(tokens_P) - 1 for tokens_P in rest], device=self._device)
        last_QD = hidden_QPD[torch.arange(len(rest), device=self._device), lasts]
        return cache, self._head(last_QD)

    def _read(self, cache: DynamicCache, tokens_QP: Ints) -> torch.Tensor:
        """The hidden states of tokens that follow those in the cache, and are in it then."""
        width = cache.get_seq_length() + tokens_QP.shape[1]
        out = self._lm.base_model(
            input_ids=torch.from_numpy(tokens_QP).to(self._device),
            attention_mask=torch.ones(len(tokens_QP), width, dtype=torch.long, device=self._device),
            past_key_values=cache,
            use_cache=True,
        )
        hidden_QPD: torch.Tensor = out.last_hidden_state
        return hidden_QPD


def _common_beginning(prompts: Sequence[Ints]) -> int:
    """How many tokens all prompts begin with; every one has at least one token more."""
    least = min(map(len, prompts)) - 1
    differ = np.any([p[:least] != prompts[0][:least] for p in prompts], axis=0)
    return int(np.argmax(differ)) if differ.any() else least


@dataclass(frozen=True, eq=False)
class Written:
    """What has been written of each response; W of them, N tokens at most."""

    tokens_WN: Ints
    logprobs_WN: np.ndarray
    lengths_W: Ints
    ended_W: Bools

    @classmethod
    def nothing(cls, responses: int, limit: int) -> Written:
        """Before the first token."""
        shape = (responses, limit)
        return cls(
            np.zeros(shape, np.int64),
            np.zeros(shape, np.float32),
            np.zeros(responses, np.int64),
            np.zeros(responses, np.bool_),
        )

    def add(self, who: Ints, tokens: Ints, logprobs: np.ndarray, stops: Bools) -> Bools:
        """One token each to some responses; which of them are at their end."""
        at = self.lengths_W[who]
        self.tokens_WN[who, at], self.logprobs_WN[who, at] = tokens, logprobs
        self.lengths_W[who] += 1
        self.ended_W[who] = stops
        done: Bools = stops | (at + 1 == self.tokens_WN.shape[1])
        return done
