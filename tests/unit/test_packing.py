"""Packed rows give the log-probabilities, values and gradients of sequences that run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_dist.data import tables
from ppo_dist.data.batching import pack_rows
from ppo_dist.models.critic import load_critic
from ppo_dist.models.packing import Packing, attend
from ppo_dist.models.policy import PolicyModel, load_policy

Rows = list[tuple[np.ndarray, int]]


@pytest.fixture
def rows() -> Rows:
    """Six sequences of three prompts; the second prompt is one token, two responses too. The third
    begins with four tokens of the first.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 18, n) for n in (5, 1, 9)]
    prompts[2][:4] = prompts[0][:4]
    shape = ((0, 3), (1, 1), (0, 1), (2, 4), (0, 6), (1, 5))
    return [
        (np.concatenate([prompts[i], rng.integers(3, 18, m)]), len(prompts[i])) for i, m in shape
    ]


def row_tensors(rows: Rows, end: bool) -> list[Any]:
    """The arguments of a model's forward pass."""
    row = vars(pack_rows(rows, end))
    return [value if name == "shapes" else torch.as_tensor(value) for name, value in row.items()]


@pytest.mark.parametrize(("chunk", "table"), [(4, 10**6), (1000, 10**6), (1000, 0)])
def test_logprobs_and_gradients_equal_separate_runs(
    tiny_model: Path, rows: Rows, chunk: int, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all sequences in one table, and with a table for each length, in which what is shared
    asks once.
    """
    monkeypatch.setattr(tables, "TABLE", table)
    policy = PolicyModel(load_policy(str(tiny_model), torch.float32), logits_chunk=chunk).train()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tensors = row_tensors(rows, end=False)
    asks_once = [queries < keys for _, keys, queries in tensors[4]]
    assert any(asks_once) == (table == 0)
    out = policy(*tensors, torch.full((len(tensors[-1]),), 0.7))
    expected = []
    for tokens, prompt in rows:
        logits = plain(torch.as_tensor(tokens)[None]).logits[0, prompt - 1 : -1] / 0.7
        expected.append(logits.log_softmax(-1))
    table = torch.cat(expected)
    targets = torch.cat([torch.as_tensor(tokens[prompt:]) for tokens, prompt in rows])
    logprobs = table.gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(out.logprobs_K, logprobs, atol=1e-5)
    assert torch.allclose(out.entropy_K, -(table.exp() * table).sum(-1), atol=1e-5)
    assert torch.equal(out.is_argmax_K, (table.argmax(-1) == targets).float())
    weights = torch.linspace(-1, 1, len(targets))
    (out.logprobs_K * weights).sum().backward()
    (logprobs * weights).sum().backward()
    for (name, ours), theirs in zip(policy.lm.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4), name


def test_values_equal_separate_runs(tiny_model: Path, rows: Rows) -> None:
    critic = load_critic(str(tiny_model), torch.float32)
    tensors = row_tensors(rows, end=True)
    assert not critic(*tensors[:-1]).any(), "a new critic values everything 0"
    torch.nn.init.normal_(critic.head.weight)
    packed = critic(*tensors[:-1])
    alone = torch.cat([critic(*row_tensors([row], end=True)[:-1]) for row in rows])
    assert torch.allclose(packed, alone, atol=1e-5)
    assert len(packed) == sum(len(tokens) - prompt + 1 for tokens, prompt in rows)


def test_a_prompt_is_computed_once_for_its_responses(rows: Rows) -> None:
    row = pack_rows(rows, end=False)
    # prompts once, what they begin with too, and each response without its last token
    assert len(row.tokens_S) == 5 + 1 + 9 - 4 + sum(len(t) - p - 1 for t, p in rows)


def test_unknown_kinds_of_attention_are_refused() -> None:
    query = torch.zeros(1, 1, 3, 4)
    packing = Packing(torch.arange(3), torch.arange(3), ((1, 3, 3),))
    with pytest.raises(ValueError, match="sliding_window"):
        attend(torch.nn.Identity(), query, query, query, None, packing=packing, sliding_window=2)
    with pytest.raises(ValueError, match="softcap"):
        attend(torch.nn.Identity(), query, query, query, None, packing=packing, softcap=30.0)
