"""The `hf` engine: our own decoding loop over a transformers model's KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ppo_dist.protocols import NamedTensors
from ppo_dist.types import Chunk, Floats, Ints, Request, Rollout, Sampling


class HfEngine:
    """Generates a chunk as one batch: prefill each prompt once, then token by token, without the
    finished ones.

    The random numbers of a response follow from (run seed, stream, step, prompt uid, response
    index) alone, so tokens do not depend on which worker generates, nor on the order of chunks.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        device: torch.device,
    ) -> None:
        self._lm = lm.to(device).eval()
        self._tokenizer = tokenizer
        self._stops = torch.tensor(sorted(stops), device=device)
        self._device = device
        self._version: int | None = 0  # the model as it was read from disk

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
        self._version = version

    @torch.inference_mode()
    def generate(self, chunk: Chunk) -> list[Rollout]:
        """See RolloutEngine.

        Raises:
            ValueError: the chunk asks for a version that is not loaded.
        """
        if chunk.version != self._version:
            raise ValueError(
                f"asked for version {chunk.version}, version {self._version} is loaded"
            )
        sampling = chunk.sampling
        wanted = [
            (request.prompt, index) for request in chunk.requests for index in request.indices
        ]
        uniforms_BN = torch.from_numpy(
            np.stack(
                [_uniforms(sampling, chunk.step, prompt.uid, index) for prompt, index in wanted]
            )
        ).to(self._device)
        tokens, logprobs = self._decode(chunk.requests, uniforms_BN, sampling)
        stops = set(self._stops.tolist())
        return [
            Rollout(
                prompt=prompt,
                index=index,
                tokens_R=tokens_R,
                logprobs_R=logprobs_R,
                text=self._tokenizer.decode(tokens_R, skip_special_tokens=True),
                finish="eos" if int(tokens_R[-1]) in stops else "length",
                version=chunk.version,
            )
            for (prompt, index), tokens_R, logprobs_R in zip(wanted, tokens, logprobs, strict=True)
        ]

    def _decode(
        self, requests: Sequence[Request], uniforms_BN: torch.Tensor, sampling: Sampling
    ) -> tuple[list[Ints], list[Floats]]:
        """Tokens and log-probabilities of each response, in order."""
        cache, logits, mask, next_positions = self._prefill(requests)
        rows = len(uniforms_BN)
        tokens_BN = torch.zeros(
            rows, sampling.max_new_tokens, dtype=torch.long, device=self._device
        )
        logprobs_BN = torch.zeros(rows, sampling.max_new_tokens, device=self._device)
        lengths_B = torch.zeros(rows, dtype=torch.long, device=self._device)
        live = torch.arange(rows, device=self._device)
        for n in range(sampling.max_new_tokens):
            tokens, logprobs = _draw(logits, uniforms_BN[live, n], sampling)
            tokens_BN[live, n], logprobs_BN[live, n], lengths_B[live] = tokens, logprobs, n + 1
            going = ~torch.isin(tokens, self._stops)
            if n + 1 == sampling.max_new_tokens or not going.any():
                break
            if not going.all():
                keep = going.nonzero()[:, 0]
                live, tokens, mask, next_positions = (
                    live[keep],
                    tokens[keep],
                    mask[keep],
                    next_positions[keep],
                )
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            out = self._lm(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=next_positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
            next_positions = next_positions + 1
        lengths = lengths_B.tolist()
        all_tokens, all_logprobs = tokens_BN.cpu().numpy(), logprobs_BN.cpu().numpy()
        return (
            [all_tokens[b, :length].copy() for b, length in enumerate(lengths)],
            [all_logprobs[b, :length].copy() for b, length in enumerate(lengths)],
        )

    def _prefill(
        self, requests: Sequence[Request]
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cache, next-token logits, attention mask and next positions, one row per response;
        prompts are padded left.
        """
        prompts = [request.prompt.tokens_P for request in requests]
        width = max(map(len, prompts))
        tokens_QP = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_QP = torch.zeros(len(prompts), width, dtype=torch.long)
        for q, tokens_P in enumerate(prompts):
            tokens_QP[q, width - len(tokens_P) :] = torch.from_numpy(tokens_P)
            mask_QP[q, width - len(tokens_P) :] = 1
        tokens_QP, mask_QP = tokens_QP.to(self._device), mask_QP.to(self._device)
        cache = DynamicCache()
        out = self._lm(
            input_ids=tokens_QP,
            attention_mask=mask_QP,
            position_ids=(mask_QP.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        repeats = torch.tensor([len(request.indices) for request in requests], device=self._device)
        row_of = torch.arange(len(prompts), device=self._device).repeat_interleave(repeats)
        cache.batch_select_indices(row_of)
        return cache, out.logits[row_of, -1], mask_QP[row_of], mask_QP.sum(1)[row_of]


def _uniforms(sampling: Sampling, step: int, uid: str, index: int) -> np.ndarray:
    """The random numbers in [0, 1) of one response, one a token."""
    key = f"{sampling.seed}/{sampling.stream}/{step}/{uid}/{index}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_new_tokens)


def _draw(
    logits: torch.Tensor, uniforms_B: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_B, logprobs_B): the inverse of the cumulative distribution at each uniform;
    temperature 0 takes the argmax.

    The sums run in float64, so that the tail of a large vocabulary is not lost; a token of
    probability 0 is never drawn.
    """
    logprobs_BV = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.temperature == 0:
        tokens = logprobs_BV.argmax(-1)
    else:
        cumulative = _cut(logprobs_BV.double().exp(), sampling).cumsum(-1)
        point = uniforms_B[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )
    return tokens, logprobs_BV.gather(-1, tokens[:, None])[:, 0]


def _cut(probabilities_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities with 0 for all but the `top_k` likeliest tokens, and for those that are not in
    the smallest set of the likeliest whose sum reaches `top_p`.
    """
    if sampling.top_k == 0 and sampling.top_p == 1:
        return probabilities_BV
    ordered, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
    if sampling.top_k:
        dropped[:, sampling.top_k :] = True
    return probabilities_BV.masked_fill(dropped.gather(-1, order.argsort(-1)), 0.0)
