"""The hf engine against transformers itself, and the determinism that it promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ppo_dist.data.chunks import chunks
from ppo_dist.models.policy import load_policy
from ppo_dist.rollout.hf import HfEngine
from ppo_dist.rollout.sampling import draw
from ppo_dist.types import Prompt, Rollout, Sampling

EOS = 1


def engine(tiny_model: Path, slots: int | None = None) -> HfEngine:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = load_policy(str(tiny_model), torch.float32)
    return HfEngine(model, tokenizer, frozenset({EOS}), torch.device("cpu"), slots)


def prompts(count: int = 7) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(f"p:{i}", "verifiable", "", rng.integers(3, 18, int(rng.integers(1, 9))))
        for i in range(count)
    ]


def generate(
    tiny_model: Path,
    temperature: float,
    group: int = 2,
    size: int = 6,
    slots: int | None = None,
    begin: Sequence[int] = (),
) -> list[Rollout]:
    sampling = Sampling(temperature, max_new_tokens=12, seed=0, stream="train")
    asked = [replace(p, tokens_P=np.append(np.int64(begin), p.tokens_P)) for p in prompts()]
    made = chunks(asked, group, size, step=4, version=0, sampling=sampling)
    worker = engine(tiny_model, slots)
    return [rollout for chunk in made for rollout in worker.generate(chunk)]


def plain(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def greedy(model: PreTrainedModel, prompt: Prompt, limit: int) -> list[int]:
    """What transformers' own `generate` writes."""
    tokens = torch.from_numpy(prompt.tokens_P)[None]
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=limit,
        eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return out[0, tokens.shape[1] :].tolist()


def test_greedy_equals_transformers_generate(tiny_model: Path) -> None:
    model = plain(tiny_model)
    for rollout in generate(tiny_model, temperature=0.0, group=1):
        assert rollout.tokens_R.tolist() == greedy(model, rollout.prompt, 12)


@pytest.mark.parametrize("begin", [[], [5, 9, 3, 4] * 3], ids=["", "one beginning"])
def test_logprobs_are_those_of_a_plain_forward_pass(tiny_model: Path, begin: list[int]) -> None:
    model = plain(tiny_model)
    for rollout in generate(tiny_model, temperature=0.7, begin=begin):
        prompt = torch.from_numpy(rollout.prompt.tokens_P)
        response = torch.from_numpy(rollout.tokens_R)
        with torch.no_grad():
            logits = (
                model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
            )
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        assert np.allclose(rollout.logprobs_R, expected.numpy(), atol=2e-5)


def test_stops_at_eos_or_at_the_limit_and_says_which(tiny_model: Path) -> None:
    rollouts = generate(tiny_model, temperature=2.0, group=16)
    assert {r.finish for r in rollouts} == {"eos", "length"}
    for rollout in rollouts:
        tokens = rollout.tokens_R.tolist()
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == (rollout.finish == "eos")
        assert rollout.finish == "eos" or len(tokens) == 12


def test_tokens_do_not_depend_on_the_cut_into_chunks(tiny_model: Path) -> None:
    def by_key(size: int) -> dict[tuple[str, int], list[int]]:
        rollouts = generate(tiny_model, temperature=1.0, size=size)
        return {(r.prompt.uid, r.index): r.tokens_R.tolist() for r in rollouts}

    assert by_key(3) == by_key(64)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_sequence_that_ends_makes_room_for_the_next(tiny_model: Path, slots: int) -> None:
    """Never more than `slots` at a time, unless a prompt alone has more responses."""
    whole = generate(tiny_model, temperature=1.5, group=2, size=64)
    worker = engine(tiny_model, slots)
    rows: list[int] = []
    worker._lm.base_model.register_forward_pre_hook(
        lambda lm, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    (chunk,) = chunks(prompts(), 2, 64, 4, 0, Sampling(1.5, 12, 0, "train"))
    refilled = worker.generate(chunk)
    assert max(rows) == max(slots, 2)
    assert sum(rows) < max(slots, 2) * 7 * 12, "ended sequences cost nothing"
    for one, two in zip(refilled, whole, strict=True):
        assert (one.prompt.uid, one.index) == (two.prompt.uid, two.index)
        assert one.tokens_R.tolist() == two.tokens_R.tolist()
        np.testing.assert_allclose(one.logprobs_R, two.logprobs_R, atol=2e-5)


def test_a_prompt_is_read_once_for_all_its_responses(tiny_model: Path) -> None:
    worker, read = engine(tiny_model), []
    worker._lm.base_model.register_forward_pre_hook(
        lambda lm, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    (chunk,) = chunks(prompts(3), 5, 64, 4, 0, Sampling(1.0, 1, 0, "train"))
    assert len(worker.generate(chunk)) == 15
    assert [shape[0] for shape in read] == [3]


def test_what_all_prompts_begin_with_is_read_once(tiny_model: Path) -> None:
    worker, read = engine(tiny_model), []
    worker._lm.base_model.register_forward_pre_hook(
        lambda lm, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    begin = [5, 6, 7, 8] * 2
    worker._prefill([np.array(begin + rest) for rest in ([5, 6], [9], [5])])
    worker._prefill([np.array([*begin, 5])] * 2)  # each has a last token of its own
    worker._prefill([np.array(begin)] * 2)  # too few to be worth it
    assert read == [(1, 8), (3, 2), (1, 8), (2, 1), (2, 8)]


def test_long_responses_outgrow_the_first_columns(tiny_model: Path) -> None:
    model, worker = plain(tiny_model), engine(tiny_model)
    (chunk,) = chunks(prompts(2), 1, 8, 4, 0, Sampling(0.0, 50, 0, "train"))
    for rollout in worker.generate(chunk):
        assert rollout.tokens_R.tolist() == greedy(model, rollout.prompt, 50)


def test_refuses_sequences_beyond_a_sliding_window(tiny_model: Path) -> None:
    worker = engine(tiny_model)
    worker._window = 12
    (chunk,) = chunks(prompts(), 1, 64, 4, 0, Sampling(1.0, 12, 0, "train"))
    with pytest.raises(ValueError, match="sliding_window"):
        worker.generate(chunk)


def test_other_indices_seeds_and_steps_give_other_tokens(tiny_model: Path) -> None:
    worker = engine(tiny_model)

    def tokens(step: int, seed: int, stream: str) -> list[list[int]]:
        sampling = Sampling(1.0, 12, seed, stream)
        (chunk,) = chunks(prompts(1), 2, 8, step, 0, sampling)
        return [r.tokens_R.tolist() for r in worker.generate(chunk)]

    base = tokens(0, 0, "train")
    assert base[0] != base[1]
    assert base == tokens(0, 0, "train")
    assert base != tokens(1, 0, "train")
    assert base != tokens(0, 1, "train")
    assert base != tokens(0, 0, "eval")


def test_sampling_follows_the_distribution(tiny_model: Path) -> None:
    """First tokens of 4,000 responses against the model's own probabilities (chi-square)."""
    worker, model, prompt = engine(tiny_model), plain(tiny_model), prompts(1)
    (chunk,) = chunks(prompt, 4000, 4000, 0, 0, Sampling(1.0, 1, 0, "train"))
    first = np.array([r.tokens_R[0] for r in worker.generate(chunk)])
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt[0].tokens_P)[None]).logits[0, -1]
    expected = logits.softmax(-1).double().numpy() * len(first)
    seen = np.bincount(first, minlength=len(expected))
    statistic = float((((seen - expected) ** 2) / expected).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_refuses_another_version_and_wrong_weights(tiny_model: Path) -> None:
    worker = engine(tiny_model)
    (chunk,) = chunks(prompts(1), 1, 8, 0, 3, Sampling(1.0, 2, 0, "train"))
    with pytest.raises(ValueError, match="version 3"):
        worker.generate(chunk)
    good = dict(plain(tiny_model).named_parameters())
    name = next(iter(good))
    with pytest.raises(ValueError, match="no weights for"):
        worker.load(3, [(n, t) for n, t in good.items() if n != name])
    with pytest.raises(ValueError, match=name):
        worker.load(3, [(name, torch.zeros(3))])
    (older,) = chunks(prompts(1), 1, 8, 0, 0, Sampling(1.0, 2, 0, "train"))
    with pytest.raises(ValueError, match="version None is loaded"):
        worker.generate(older)  # of which a part may have been overwritten
    worker.load(3, good.items())
    assert worker.generate(chunk)[0].version == 3


def test_what_is_not_a_number_still_gives_a_token() -> None:
    logits = torch.full((2, 300), torch.nan)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.9]), Sampling(1.0, 1, 0, "train"))
    assert (tokens < 300).all() and logprobs.isnan().all()


@pytest.mark.parametrize("vocabulary", [4, 256, 257, 5000])
def test_drawing_is_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    """At uniforms of every size, the two ends among them, with some tokens of probability 0."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(1, vocabulary, generator=generator) * 3
    logits[0, torch.randperm(vocabulary, generator=generator)[: vocabulary // 3]] = -torch.inf
    points = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    points = torch.cat([points, torch.tensor([1 - 2**-53], dtype=torch.float64)])
    tokens, _ = draw(logits.expand(len(points), -1), points, Sampling(1.0, 1, 0, "train"))
    weights = logits[0].log_softmax(-1).exp().double()
    upto = weights.cumsum(0)
    assert (weights[tokens] > 0).all()
    slack = 1e-12
    assert (upto[tokens] >= points * upto[-1] - slack).all()
    assert (upto[tokens] - weights[tokens] <= points * upto[-1] + slack).all()


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, 4),
        (1.0, 2, 2),
        (0.49, 0, 1),
        (0.51, 0, 2),
        (0.85, 0, 3),
        (0.85, 2, 2),
        (1e-9, 0, 1),
    ],
)
def test_evaluation_may_cut_the_tail(top_p: float, top_k: int, kept: int) -> None:
    """Of tokens with 0.5, 0.3, 0.15 and 0.05, in another order, at 1,000 points."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().repeat(1000, 1)
    sampling = Sampling(1.0, 1, 0, "eval", top_p, top_k)
    tokens, logprobs = draw(logits, torch.linspace(0, 0.9999, 1000), sampling)
    assert set(tokens.tolist()) == set([1, 3, 0, 2][:kept])
    assert torch.allclose(logprobs, logits[0][tokens], atol=1e-6)
