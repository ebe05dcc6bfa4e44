"""The policy (and the reference, which is a frozen policy)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_dist.models.head import Head
from ppo_dist.models.packing import ATTENTION, Packing, no_mask
from ppo_dist.types import Shapes

# of Gemma, Cohere and Granite: their logits are not what the head alone gives
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class PolicyOutput(NamedTuple):
    """What the policy says of each response position: the log-probability of its token, the entropy
    of the distribution that it came from, 1 where the token was the likeliest, else 0, and the
    value of the state before it (0 without a value head).
    """

    logprobs_K: torch.Tensor
    entropy_K: torch.Tensor
    is_argmax_K: torch.Tensor
    values_K: torch.Tensor


def load_policy(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model without dropout, whose attention works within packed sequences."""
    lm = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=ATTENTION,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    without_dropout(lm)
    return lm


def without_dropout(module: nn.Module) -> None:
    """Sets every dropout to 0: the ratio of new and old probabilities would be noise otherwise.
    Some models keep it as a number, and call torch's function with it.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(part, name, 0.0)


def stop_tokens(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a response: the tokenizer's, and those of the model's generation settings."""
    stops = {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation settings
        eos = None
    if eos is not None:
        stops.update(eos if isinstance(eos, list) else [eos])
    return frozenset(stops)


class PolicyModel(nn.Module):
    """A language model that reads packed rows and speaks of response positions alone."""

    def __init__(
        self, lm: PreTrainedModel, logits_chunk: int | None, has_value_head: bool = False
    ) -> None:
        super().__init__()
        if (name := after_the_head(lm.config)) is not None:
            raise ValueError(f"models with {name} are not supported")
        self.lm = lm
        self.head = Head(lm.get_output_embeddings(), logits_chunk)
        self.value_head = value_head(lm) if has_value_head else None

    def forward(
        self,
        tokens_S: torch.Tensor,
        positions_S: torch.Tensor,
        slots_N: torch.Tensor,
        home_S: torch.Tensor,
        shapes: Shapes,
        states_K: torch.Tensor,
        targets_K: torch.Tensor,
        temperature_K: torch.Tensor,
    ) -> PolicyOutput:
        """Of softmax(logits / temperature), in fp32; see Head."""
        packing = Packing(slots_N, home_S, shapes)
        hidden_KH = hidden(self.lm.base_model, tokens_S, positions_S, packing, states_K)
        logprobs_K, entropy_K, is_argmax_K = self.head(hidden_KH, targets_K, temperature_K)
        values_K = torch.zeros_like(logprobs_K)
        if self.value_head is not None:
            values_K = self.value_head(hidden_KH)
        return PolicyOutput(logprobs_K, entropy_K, is_argmax_K, values_K)


def after_the_head(config: PretrainedConfig) -> str | None:
    """What is done to the logits of a model beyond its head, which is not computed here."""
    shape = config.to_dict()
    return next((name for name in AFTER_THE_HEAD if shape.get(name) not in (None, 1.0)), None)


class ValueHead(nn.Linear):
    """The value of each state, in fp32 whatever the trunk computes in: values of bf16 have steps as
    large as what they differ by from token to token.
    """

    def forward(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """values_K."""
        values_K: torch.Tensor = F.linear(hidden_KH.float(), self.weight.float())[:, 0]
        return values_K


def value_head(lm: PreTrainedModel) -> ValueHead:
    """A new head: 0 everywhere, so that the first advantages are the rewards themselves."""
    head = ValueHead(lm.config.hidden_size, 1, bias=False, dtype=lm.dtype)
    nn.init.zeros_(head.weight)
    return head


def hidden(
    trunk: nn.Module,
    tokens_S: torch.Tensor,
    positions_S: torch.Tensor,
    packing: Packing,
    states_K: torch.Tensor,
) -> torch.Tensor:
    """The trunk's last hidden states at the row indices `states_K`, (K, hidden size)."""
    out = trunk(
        input_ids=tokens_S[None],
        position_ids=positions_S[None],
        attention_mask=no_mask(tokens_S),
        packing=packing,
        use_cache=False,
    )
    states: torch.Tensor = out.last_hidden_state[0].index_select(0, states_K)
    return states
