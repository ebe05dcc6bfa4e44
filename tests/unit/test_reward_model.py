"""A reward model in one process, against transformers' own forward pass, row by row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from ppo_dist import build
from ppo_dist.config import Config, InputError, reward_models
from ppo_dist.config.reward import ModelReward
from ppo_dist.models.compiled import why_not
from ppo_dist.reports import Vitals
from ppo_dist.rewards.model import ModelScores, RewardModel, Traces
from ppo_dist.types import Prompt, Rollout
from tests.conftest import raw_config
from tests.contract import suites


def classifier(folder: Path, base: Path, labels: int = 1) -> Path:
    """A causal classifier on a tiny policy's trunk, with its tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def encoder(folder: Path, base: Path) -> Path:
    """A model that is not causal, with another tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["more"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(2)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rollouts(base: Path) -> list[Rollout]:
    """Nine responses to three prompts, of mixed lengths."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = []
    for n, response in enumerate(["ab", "ponm", "", "cdefg", "p", "aaaa", "hgfedc", "b", "no"]):
        text = ["abc>", "ponmlk>", "d>"][n % 3]
        tokens_P = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        tokens_R = np.array([*tokenizer(response, add_special_tokens=False)["input_ids"], 1])
        prompt = Prompt(f"p:{n % 3}", "verifiable", text, tokens_P)
        nothing = np.zeros(len(tokens_R), np.float32)
        made.append(Rollout(prompt, n // 3, tokens_R, nothing, response, "eos", 0))
    return made


def scores_of(path: Path, base: Path, **section: Any) -> ModelScores:
    made = ModelReward(kind="model", path=str(path), **section)
    model = RewardModel(made, str(base), "cpu", Traces(path.parent / "profile", 3, calls=1))
    return ModelScores(made, lambda shares: [model.judge(share) for share in shares])


@pytest.mark.parametrize(("batch_tokens", "compiled"), [(8, False), (10_000, False), (8, True)])
def test_a_causal_model_reads_packed_rows(
    tmp_path: Path, tiny_model: Path, batch_tokens: int, compiled: bool
) -> None:
    if compiled and (error := why_not("cpu")) is not None:
        pytest.skip(f"torch cannot compile here: {error}")
    path = classifier(tmp_path / "rm", tiny_model)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    source = scores_of(path, tiny_model, batch_tokens=batch_tokens, compile=compiled)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    found = source.score(rollouts(tiny_model))
    assert (graphs["unique_graphs"] > before) == compiled
    for rollout, score in zip(rollouts(tiny_model), found, strict=True):
        tokens = np.concatenate([rollout.prompt.tokens_P, rollout.tokens_R])[None]
        with torch.no_grad():
            trunk = model.base_model(torch.from_numpy(tokens), use_cache=False)
            alone = float(model.score(trunk.last_hidden_state[0, -1]))
        assert score.value == pytest.approx(alone, abs=1e-5) and score.source == "model"
    assert len({round(score.value, 4) for score in found}) == len(found), "they tell them apart"


def test_the_call_after_the_first_is_traced(tmp_path: Path, tiny_model: Path) -> None:
    source = scores_of(classifier(tmp_path / "rm", tiny_model), tiny_model)
    for _ in range(3):
        source.score(rollouts(tiny_model))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "reward-3-1.json"
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_other_models_read_text(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    base = tiny_models["gpt2"]
    path = encoder(tmp_path / "rm", base)
    found = scores_of(path, base).score(rollouts(base))
    model = BertForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for rollout, score in zip(rollouts(base), found, strict=True):
        with torch.no_grad():
            pair = tokenizer(rollout.prompt.text, rollout.text, return_tensors="pt")
            alone = float(model(**pair).logits)
        assert score.value == pytest.approx(alone, abs=1e-5)


def test_another_vocabulary_is_read_as_text(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The same model behind another tokenizer: what it is given are its own tokens."""
    base = tiny_models["gpt2"]
    path = classifier(tmp_path / "rm", base)
    expected = scores_of(path, base).score(rollouts(base))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(path)
    found = scores_of(path, base).score(rollouts(base))
    assert [s.value for s in found] == pytest.approx([s.value for s in expected], abs=1e-5)


def test_contract(tmp_path: Path, tiny_model: Path) -> None:
    path = classifier(tmp_path / "rm", tiny_model)
    raw = raw_config(tmp_path, reward={"verifiable": {"kind": "model", "path": str(path)}})
    with build.rollout_pool(Config.model_validate(raw), str(tiny_model)) as (_, source):
        suites.check_reward_source(source, rollouts(tiny_model), rounding=1e-5)
        source.vitals()
        end = time.monotonic() + 0.2  # Linux counts a process's time in hundredths of a second
        while time.monotonic() < end:
            source.score(rollouts(tiny_model))
        (told,) = source.vitals().values()
        assert 0 < told.busy_s <= told.seconds and told.cpu_s > 0 and told.memory
        assert source.vitals() == {0: Vitals()}, "once"


def test_weighted_with_a_rule(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    base = tiny_models["llama"]
    path = classifier(tmp_path / "rm", base)
    model = {"kind": "model", "path": str(path)}
    rule = {"kind": "regex", "pattern": "^p"}
    parts = [{"weight": 2.0, "reward": model}, {"weight": 1.0, "reward": rule}]
    raw = raw_config(tmp_path, reward={"verifiable": {"kind": "weighted", "parts": parts}})
    config = Config.model_validate(raw)
    assert [section.path for section in reward_models(config)] == [str(path)]
    alone = scores_of(path, base).score(rollouts(base))
    with build.rollout_pool(config, str(base)) as (_, source):
        found = source.score(rollouts(base))
    for rollout, score, plain in zip(rollouts(base), found, alone, strict=True):
        expected = 2 * plain.value + rollout.text.startswith("p")
        assert score.value == pytest.approx(expected, abs=1e-5)
        assert score.source == "model+regex"


def test_wrong_models_are_refused_before_anything_loads(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    base = tiny_models["gpt2"]
    for path, text in (
        (tmp_path / "none", "no such model folder"),
        (base, "sequence-classification model with one output; this is GPT2LMHeadModel"),
        (classifier(tmp_path / "three", base, labels=3), "with 3 output"),
        (classifier(tmp_path / "two", base, labels=2), "with 2 output"),
    ):
        raw = raw_config(tmp_path, reward={"verifiable": {"kind": "model", "path": str(path)}})
        with pytest.raises(InputError, match=text):
            build.check(Config.model_validate(raw))
