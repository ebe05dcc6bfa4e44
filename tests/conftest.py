"""Shared by all tests: one Ray session, small models, small configs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--soak STEPS`: how long the soak test is."""
    parser.addoption("--soak", type=int, help="steps of tests/faults/test_soak.py (default: 500)")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray of the test run, with more logical CPUs than the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        # actors import the fakes too
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent.parent)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def tiny_model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    """Each of the tiny models in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random GPT-2 and a random Llama with grouped queries, of a few thousand parameters."""
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from ppo_dist.config.data import FromScratch
    from ppo_dist.models.scratch import make_model

    folder = tmp_path_factory.mktemp("models")
    shape = FromScratch(layers=2, hidden=32, heads=2, context=64)
    for name in ("gpt2", "llama"):
        make_model(folder / name, shape, ["abcdefghijklmnop>"], seed=1)
    gpt2 = GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    with torch.no_grad():  # GPT-2's own start is so small that its answers are nearly uniform
        for parameter in gpt2.parameters():
            if parameter.dim() == 2:
                parameter *= 10
    gpt2.save_pretrained(folder / "gpt2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder / "llama")),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return {name: folder / name for name in ("gpt2", "llama")}


TIMINGS = ("timing_s/", "perf/", "system/")  # what differs between two runs that are equal


ROLLOUT_BACK_S, LEARNERS_BACK_S = 30, 60  # how soon there are new ones for those that were lost


def raw_config(folder: Path, **sections: Any) -> dict[str, Any]:
    """A small run on words spelled backward, as plain data; sections are merged over it."""
    words = {
        "kind": "reasoning_gym",
        "task": "spell_backward",
        "prompt_template": "{word}>",
        "options": {"min_word_len": 3, "max_word_len": 4},
    }
    raw: dict[str, Any] = {
        "run": {"dir": str(folder), "seed": 3},
        "train": {"steps": 3},
        "model": {"scratch": {"layers": 2, "hidden": 32, "heads": 2, "context": 32}},
        "data": {
            "labelled": {**words, "size": 24, "seed": 1, "split": "train"},
            "verifiable": {**words, "size": 40, "seed": 2, "split": "train"},
            "held_out": {**words, "size": 16, "seed": 3, "split": "held_out"},
        },
        "reward": {"labelled": "exact", "verifiable": "reasoning_gym"},
        "mix": {"schedule": 0.5, "prompts": 6, "labelled_batch": 4},
        "rollout": {"group_size": 2, "max_new_tokens": 6, "chunk": 4},
        "learner": {
            "micro_batch_tokens": 48,
            "lr": 0.05,
            "critic_lr": 0.05,
            "optimizer": "sgd",
            "max_grad_norm": 0.0,
            "critic_max_grad_norm": 0.0,
        },
        "algorithm": {"epochs": 1, "minibatches": 2, "kl": 0.05},
        "cluster": {"kind": "local", "wait_s": 60},  # a busy machine is slow to free them
        "tracking": {"wandb": "off", "progress": False},
    }
    for name, section in sections.items():
        raw[name] = None if section is None else {**raw.get(name, {}), **section}
    return raw
