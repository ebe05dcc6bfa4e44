"""The peer is found where it is, and does the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.__main__ import has_trl
from tests.bench.work import Work


@pytest.mark.parametrize("folder", ["trl", "trl/experimental/ppo"])
def test_only_a_trl_with_a_ppo_trainer_counts(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "trl/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert has_trl() == (folder != "trl")


@pytest.mark.slow
@pytest.mark.skipif(not has_trl(), reason="no TRL with a PPOTrainer")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_iterations(dtype: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tests.bench import trl

    judge = AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"], num_labels=1)
    judge.save_pretrained(tmp_path / "reward")
    words = AutoTokenizer.from_pretrained(tiny_models["llama"])(["abc>", "p>", "fghijk>", "no>"])
    prompts = tmp_path / "seen.json"
    asked = [words["input_ids"][:1]] + 2 * [words["input_ids"]]
    prompts.write_text(json.dumps({"prompts": asked}))
    work = Work("W", 4, 2, 12, iterations=2, dtype=dtype, micro_batch=2)
    found = trl.run(work, tiny_models["llama"], tmp_path / "reward", prompts)
    assert work.sequences <= found.tokens <= 12 * work.sequences
    assert found.seconds["step"] > 0
