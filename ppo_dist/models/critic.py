"""The critic: a trunk like the policy's and a scalar head."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from ppo_dist.models.packing import ATTENTION, Packing
from ppo_dist.models.policy import hidden, value_head, without_dropout
from ppo_dist.types import Shapes


class CriticModel(nn.Module):
    """The value of each state of a response: the reward that the policy can still expect."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = value_head(trunk)

    def forward(
        self,
        tokens_S: torch.Tensor,
        positions_S: torch.Tensor,
        slots_N: torch.Tensor,
        home_S: torch.Tensor,
        shapes: Shapes,
        states_K: torch.Tensor,
    ) -> torch.Tensor:
        """values_K, in fp32."""
        packing = Packing(slots_N, home_S, shapes)
        hidden_KH = hidden(self.trunk, tokens_S, positions_S, packing, states_K)
        values_K: torch.Tensor = self.head(hidden_KH)
        return values_K


def load_critic(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> CriticModel:
    """A critic whose trunk is that of the model at `path`, with a head of zeros."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a trunk has no output head: that needs no warning
    try:
        trunk = AutoModel.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    finally:
        logging.set_verbosity(verbosity)
    without_dropout(trunk)
    return CriticModel(trunk)
