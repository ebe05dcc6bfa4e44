"""What model or engine have no room for is refused before any model loads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ppo_dist import build
from ppo_dist.config import Config, InputError
from ppo_dist.data.sources import Row
from ppo_dist.journey import encode
from tests.conftest import raw_config

PROMPT = Row("p:0", "p.jsonl, line 1", "abc>", response="cba", answer="cba", checker=None)
LONG = Row("p:1", "p.jsonl, line 2", "abc>", response="cba" * 30, answer="cba", checker=None)


def encoded(
    folder: Path,
    model: Path,
    rows: list[Row],
    mix: dict[str, Any],
    held_out: Sequence[Row] = (),
    test: Sequence[Row] = (),
    **rollout: Any,
) -> None:
    """On a model with a context of 64."""
    raw = raw_config(folder, rollout=rollout, mix=mix)
    config = Config.model_validate(raw)
    prompts = {"labelled": rows, "verifiable": [PROMPT], "unlabelled": []}
    encode(config, build.Rows(prompts, held_out, test, []), str(model))


@pytest.mark.parametrize("rollout", [{}, {"max_new_tokens": 60}])
def test_what_fits_is_encoded(
    tmp_path: Path, tiny_models: dict[str, Path], rollout: dict[str, int]
) -> None:
    encoded(tmp_path, tiny_models["gpt2"], [PROMPT], {}, **rollout)


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"max_new_tokens": 61}, "4 tokens .*max_new_tokens 61 .*the model's context of 64"),
        (
            {"engine": {"kind": "vllm", "max_model_tokens": 9}},
            "4 tokens .*max_new_tokens 6 .*max_model_tokens of 9",
        ),
    ],
)
def test_a_response_beyond_it(
    tmp_path: Path, tiny_models: dict[str, Path], rollout: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=f"p:0: {words}"):
        encoded(tmp_path, tiny_models["gpt2"], [PROMPT], {}, **rollout)


def test_a_run_that_generates_nothing_needs_no_room_for_it(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    mix = {"prompts": 0, "schedule": 1.0}
    encoded(tmp_path, tiny_models["gpt2"], [PROMPT], mix, max_new_tokens=61)


def test_an_example_beyond_it(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"p:1: 95 tokens with its response.* context of 64"):
        encoded(tmp_path, tiny_models["gpt2"], [PROMPT, LONG], {})


@pytest.mark.parametrize("where", ["held_out", "test"])
def test_a_response_that_is_evaluated_beyond_it(
    tmp_path: Path, tiny_models: dict[str, Path], where: str
) -> None:
    """Its likelihood is told: learners compute it, those of `test` after the last step."""
    with pytest.raises(InputError, match=r"p:1: 95 tokens with its response.* context of 64"):
        encoded(tmp_path, tiny_models["gpt2"], [PROMPT], {}, **{where: [LONG]})


@pytest.mark.parametrize(
    ("layers", "fits"),
    [(["sliding_attention", "full_attention"], False), (None, False), ([], True)],
)
def test_a_sliding_window(
    tmp_path: Path, tiny_models: dict[str, Path], layers: list[str] | None, fits: bool
) -> None:
    """Attention within one is not computed, neither in a response nor in an example."""
    model = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], model)
    found = json.loads((model / "config.json").read_text()) | {"sliding_window": 20}
    if layers is not None:
        found["layer_types"] = layers or 2 * ["full_attention"]
    (model / "config.json").write_text(json.dumps(found))
    if fits:
        return encoded(tmp_path, model, [PROMPT], {}, max_new_tokens=17)
    with pytest.raises(InputError, match=r"p:0: .* are more than its sliding_window of 20"):
        encoded(tmp_path, model, [PROMPT], {}, max_new_tokens=17)
    middling = dataclasses.replace(LONG, response="cba" * 8)
    with pytest.raises(InputError, match=r"p:1: 29 tokens .* than its sliding_window of 20"):
        encoded(tmp_path, model, [PROMPT, middling], {})
