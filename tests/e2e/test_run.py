"""Whole runs with real parts in one process: resume, export, run folder, commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_dist.config import Config, InputError
from ppo_dist.inspect import export
from ppo_dist.run import train
from tests.conftest import TIMINGS, raw_config

SUPERVISED = {"kind": "supervised_first", "steps": 2, "then": 0.5}


def config(folder: Path, steps: int, **sections: Any) -> Config:
    sections = {"mix": {"schedule": SUPERVISED}, "eval": {"every": 1}, **sections}
    learner = {"optimizer": "adamw", "lr": 1e-3, "critic_lr": 1e-3, **sections.pop("learner", {})}
    steps_and = {"steps": steps, **sections.pop("train", {})}
    return Config.model_validate(raw_config(folder, train=steps_and, learner=learner, **sections))


def run(made: Config, resume: bool | Path = False) -> int:
    return train(made, resume, Console(quiet=True))


def numbers(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five uninterrupted steps: two supervised, three mixed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(config(folder, 5)) == 0
    return folder


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, whole: Path, stop: int) -> None:
    """Stopped within the supervised phase, at its end (before the reference is fixed), and after
    it.
    """
    folder = tmp_path / "run"
    assert run(config(folder, stop)) == 0
    assert run(config(folder, 5), resume=True) == 0
    assert numbers(folder) == numbers(whole)
    assert numbers(whole)[-1]["objective/kl"] not in (None, 0.0)


def test_resumed_runs_keep_their_reference_when_its_checkpoint_is_gone(tmp_path: Path) -> None:
    """Two supervised steps, then the reference is reset; only one checkpoint is kept."""
    train = {"checkpoint_every": 1, "keep_checkpoints": 1}

    def made(steps: int) -> Config:
        whole = config(tmp_path / "run", steps)
        return whole.model_copy(update={"train": whole.train.model_copy(update=train)})

    assert run(made(3)) == 0
    for steps in (6, 8):
        assert run(made(steps), resume=True) == 0


def test_profile(tmp_path: Path) -> None:
    """Traces of the step after a worker's first, and of no other."""
    folder = tmp_path / "run"
    made = config(folder, 4, train={"profile_steps": 1}, mix={"schedule": 0.5})
    assert run(made) == 0
    found = {file.name: json.loads(file.read_text()) for file in (folder / "profile").iterdir()}
    stages = ("publish", "annotate", "update", "imitate")
    learner = {f"learner-0-{stage}-1.json" for stage in stages}
    assert found.keys() == learner | {f"rollout-step-1-chunk-{n}.json" for n in range(3)}
    operations = {event.get("name") for event in found["learner-0-update-1.json"]["traceEvents"]}
    assert "aten::mm" in operations


@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))]
)
def test_resume_at_other_zero_stages(tmp_path: Path, stage: int) -> None:
    learner = {"zero_stage": stage}
    assert run(config(tmp_path / "whole", 4, learner=learner)) == 0
    assert run(config(tmp_path / "parts", 3, learner=learner)) == 0
    assert run(config(tmp_path / "parts", 4, learner=learner), resume=True) == 0
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_keys = {"steps": 3, "checkpoint_every": 1}
    raw = raw_config(folder, train=train_keys, eval={"every": 1})
    assert run(Config.model_validate(raw)) == 0
    newest = folder / "checkpoints" / "step-00000003"
    victim = next(p for p in sorted(newest.rglob("*.safetensors")))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    before = numbers(folder)
    raw["train"]["steps"] = 4
    with pytest.raises(InputError, match=rf"{victim.name} is damaged"):
        run(Config.model_validate(raw), resume=newest)
    console = Console(record=True, width=500)
    assert train(Config.model_validate(raw), True, console) == 0
    said = console.export_text()
    assert "step-00000003" in said and victim.name in said and "damaged" in said
    assert numbers(folder)[:4] == before


def test_export_loads_and_writes_what_the_last_evaluation_wrote(whole: Path) -> None:
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    greedy = [s for s in samples if s["step"] == 5 and s["uid"].startswith("held_out")]
    assert len(greedy) == 4
    for folder in ("policy", "policy-best"):
        tokenizer = AutoTokenizer.from_pretrained(whole / folder)
        model = AutoModelForCausalLM.from_pretrained(whole / folder, dtype=torch.float32)
        assert model.config.architectures == ["GPT2LMHeadModel"]
        for sample in greedy if folder == "policy" else []:
            tokens = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=6
            )
            text = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
            assert text == sample["response"]


def test_a_complete_run_is_left_alone_and_an_open_one_refused(whole: Path, tmp_path: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    console = Console(record=True, width=500)
    assert train(config(whole, 5), False, console) == 0
    assert "is complete" in console.export_text()
    assert (whole / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="--resume"):
        run(config(whole, 6))
    with pytest.raises(InputError, match=r"run\.seed"):
        run(config(whole, 6, run={"dir": str(whole), "seed": 4}), resume=True)


def test_a_run_that_could_not_begin_holds_no_folder(tmp_path: Path) -> None:
    """What its first start was refused for can be mended, also where jobs always say --resume."""
    folder = tmp_path / "run"
    short = {"scratch": {"layers": 1, "hidden": 8, "heads": 1, "context": 8}}
    with pytest.raises(InputError, match="the model's context of 8"):
        run(config(folder, 1, model=short))
    assert not (folder / "config.yaml").exists()
    assert run(config(folder, 1), resume=True) == 0


def test_interrupt_leaves_a_checkpoint(tmp_path: Path) -> None:
    raw = raw_config(tmp_path / "run", train={"steps": 10_000})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    process = subprocess.Popen(
        [sys.executable, "-m", "ppo_dist", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said, said
    rows = numbers(tmp_path / "run")
    assert run(Config.model_validate({**raw, "train": {"steps": len(rows)}}), resume=True) == 0
    again = numbers(tmp_path / "run")
    assert again[: len(rows)] == rows and len(again) == len(rows) + 1


@pytest.mark.slow
def test_commands_beside_training(whole: Path, tmp_path: Path) -> None:
    def command(*arguments: str | Path) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "ppo_dist", *map(str, arguments)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    said = command("train", whole / "config.yaml", "--dry-run", f"run.dir={tmp_path / 'dry'}")
    assert "●" in said and "verifiable" in said and not (tmp_path / "dry").exists()
    evaluated = json.loads(command("eval", whole / "config.yaml").strip().splitlines()[-1])
    last = numbers(whole)[-1]
    for key in ("eval/held_out/accuracy", "eval/held_out/sampled_accuracy"):
        assert evaluated[key] == last[key]
    command("export", whole / "checkpoints" / "step-00000005", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        whole / "policy" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("lora", {"model": {"lora": {"rank": 4}}, "reference": {"reset": "never"}}),
        ("bf16", {"learner": {"dtype": "bf16"}}),
        ("shared trunk", {"critic": {"shared": True}}),
        ("no critic", {"algorithm": {"advantage": "group_mean", "kl": "loss"}}),
        ("no reference", {"reference": None, "algorithm": {"kl": 0}}),
    ],
)
def test_variants_resume_exactly_and_export(
    tmp_path: Path, name: str, sections: dict[str, Any]
) -> None:
    def made(folder: str, steps: int) -> Config:
        return config(tmp_path / folder, steps, **sections)

    assert run(made("whole", 4)) == 0
    assert run(made("parts", 3)) == 0
    assert run(made("parts", 4), resume=True) == 0
    rows = numbers(tmp_path / "whole")
    assert numbers(tmp_path / "parts") == rows
    if name == "no reference":
        assert "objective/kl" not in rows[-1]
    else:
        assert rows[-1]["objective/kl"] not in (None, 0.0)
    assert ("critic/loss" in rows[-1]) == (name != "no critic")
    policy = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "policy", dtype=torch.float32
    )
    initial = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "model", dtype=torch.float32
    )
    theirs = dict(initial.named_parameters())
    assert {n: p.shape for n, p in policy.named_parameters()} == {
        n: p.shape for n, p in theirs.items()
    }
    moved = [n for n, p in policy.named_parameters() if not torch.equal(p, theirs[n])]
    assert moved and (name != "lora" or all(".weight" in n and "ln_" not in n for n in moved))
    assert_is_exported_without_its_cluster(tmp_path / "whole", "step-00000004", tmp_path / "out")


def assert_is_exported_without_its_cluster(run_folder: Path, checkpoint: str, out: Path) -> None:
    written = run_folder / "config.yaml"
    raw = yaml.safe_load(written.read_text())
    raw["cluster"] = {"kind": "ray", "address": "203.0.113.1:6379"}
    raw["learner"]["workers"] = 64
    written.write_text(yaml.safe_dump(raw))
    export(run_folder / "checkpoints" / checkpoint, out)
    for file in (run_folder / "policy").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_reference_that_teaches_nothing_changes_nothing(tmp_path: Path) -> None:
    for name, sections in (("with", {}), ("without", {"reference": None})):
        assert run(config(tmp_path / name, 3, algorithm={"kl": 0}, **sections)) == 0
    with_one, without = numbers(tmp_path / "with"), numbers(tmp_path / "without")
    assert [{k: v for k, v in row.items() if k != "objective/kl"} for row in with_one] == without


@pytest.mark.parametrize("old", ["behaviour", "recompute"])
def test_before_any_update_of_its_step_the_policy_is_the_old_one(tmp_path: Path, old: str) -> None:
    """One update a step: its ratio is 1, nothing is clipped, and the behaviour's log-probabilities
    are the learner's.
    """
    algorithm = {"epochs": 1, "minibatches": 1, "old_logprobs": old}
    assert run(config(tmp_path, 4, algorithm=algorithm, mix={"schedule": 0.5})) == 0
    for row in numbers(tmp_path)[1:]:
        assert row["policy/clip_fraction"] == 0.0
        assert abs(row["policy/approx_kl"]) < 1e-6 and abs(row["policy/approx_kl_k1"]) < 1e-5
        assert row["rollout/logprob_gap"] < 1e-5


def test_without_weight_the_supervised_loss_is_plain_ppo(tmp_path: Path) -> None:
    for name, batch in (("zero", 4), ("none", 0)):
        mix = {"schedule": 0.0, "labelled_batch": batch}
        assert run(config(tmp_path / name, 2, mix=mix)) == 0
    assert numbers(tmp_path / "zero") == numbers(tmp_path / "none")
