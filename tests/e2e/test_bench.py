"""`ppo-dist bench`: each contender does the whole job in a process of its own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ppo_dist.config import InputError
from ppo_dist.study.bench import Job, bench_rollout


def job(model: Path) -> Job:
    return Job(
        model=str(model),
        sequences=6,
        slots=2,
        prompt_tokens=6,
        max_new_tokens=8,
        ends=0.1,
        dtype="fp32",
        threads=1,
        repeats=1,
    )


@pytest.mark.slow
def test_ours_stands_beside_the_library_s_own(tiny_models: dict[str, Path]) -> None:
    console = Console(file=io.StringIO(), record=True, width=120)
    assert bench_rollout(job(tiny_models["llama"]), ["transformers", "hf"], console) == 0
    printed = console.export_text()
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["transformers", "hf"]
    tokens = [int(row[4]) for row in rows]
    assert all(6 <= count <= 48 for count in tokens)
    assert rows[1][6].strip().endswith("x transformers")


def test_a_contender_that_fails_says_why(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), record=True, width=120)
    assert bench_rollout(job(tmp_path / "nothing"), ["hf"], console) == 1
    assert "hf: failed" in console.export_text()
    with pytest.raises(InputError, match="pigeon is not one of"):
        bench_rollout(job(tmp_path), ["pigeon"], console)
