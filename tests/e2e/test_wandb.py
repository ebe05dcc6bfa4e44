"""An offline run as Weights & Biases has it, by its own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import wandb
from rich.console import Console

from ppo_dist.config import Config
from ppo_dist.run import train
from ppo_dist.tracking.local import read_rows
from ppo_dist.tracking.metrics import keys
from ppo_dist.tracking.wandb import Wandb
from tests.conftest import raw_config
from tests.e2e import test_semi
from tests.unit.test_reward_model import classifier

Records = dict[str, list[Any]]
# of a run with labels, verifiable and unlabelled prompts, a critic, and pseudo-labels
PROMISED = {
    "reward": {"labelled/mean", "verifiable/mean", "unlabelled/mean"},
    "objective": {"kl"},
    "policy": {"loss", "approx_kl", "clip_fraction", "entropy", "grad_norm", "lr"},
    "critic": {"loss", "explained_variance", "clip_fraction"},
    "sup": {"loss", "accuracy", "tokens"},
    "semi": {"mu", "labelled_share", "admitted_share"},
    "pseudo": {"accept_rate", "vote_share", "label_accuracy_probe"},
    "guard": {"gap", "action"},
    "eval": {"held_out/accuracy", "held_out/reward"},
    "rollout": {"tokens", "length_mean", "truncated_rate", "logprob_gap", "version_lag"},
    "timing_s": {
        "generate", "score", "annotate", "update", "publish", "idle_rollout", "idle_learner", "step"
    },
    "perf": {"tokens_per_s", "learner_mfu"},
    "system": {
        f"{worker}/{what}"
        for worker in ("rollout-0", "learner-0", "reward-0")
        for what in ("busy_s", "cores", "memory_gb", "gpu_memory_gb")
    },
}  # fmt: skip


def read(folder: Path) -> Records:
    """The records of a run's offline files, by kind, oldest file first."""
    found: Records = defaultdict(list)
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        told = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
        for line in told.stdout.splitlines():
            record = json.loads(line)
            found[record["type"]].append(record[record["type"]])
    return found


def configured(folder: Path, steps: int) -> Config:
    words = raw_config(folder)["data"]["labelled"]
    parity = {"kind": "function", "path": test_semi.__file__, "name": "parity"}
    raw = raw_config(
        folder,
        train={"steps": steps, "checkpoint_every": 1},
        data={"unlabelled": {**words, "size": 8, "seed": 5}},
        reward={
            "unlabelled": {"kind": "vote", "extract": parity},
            "verifiable": {"kind": "model", "path": str(folder.parent / "judge")},
        },
        mix={"prompts": 6, "shares": {"labelled": 1, "verifiable": 1, "unlabelled": 1}},
        semi={
            "gate": "all",
            "pseudo": {"batch": 2},
            "probe": 0.3,
            "guard": {"gap": None, "vote_entropy": {"limit": 9.0, "action": "warn"}},
        },
        rollout={"group_size": 3},
        eval={"every": 1},
        tracking={
            "wandb": "offline",
            "tags": ["small", "test"],
            "notes": "read back",
            "artifacts": True,
        },
    )
    return Config.model_validate(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A run of two steps, and a third after a resume."""
    made = tmp_path_factory.mktemp("wandb") / "run"
    classifier(made.parent / "judge", tiny_models["llama"])
    for steps in (2, 3):
        assert train(configured(made, steps), steps > 2, Console(quiet=True)) == 0
    return made


def test_it_has_every_key_and_number_of_the_metrics_file(folder: Path) -> None:
    history = [record["item"] for record in read(folder)["history"]]
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        same = [
            item for item in history if item["step"] == row["step"] and "samples._type" not in item
        ]
        assert same, f"step {row['step']} is there"
        told = {k: v for k, v in same[-1].items() if not k.startswith("_")}
        assert told == {k: v for k, v in row.items() if v is not None}
    named = set().union(*rows)
    wanted = set(keys(configured(folder, 3)))
    assert {f"{group}/{key}" for group, own in PROMISED.items() for key in own} <= wanted
    assert wanted | {"step"} == named
    elsewhere = {key for key in wanted if key.endswith(("/gpu_memory_gb", "/dropped"))}
    assert wanted - elsewhere <= set().union(*history), "each has a number somewhere"


def test_a_resumed_run_goes_on_under_its_id_with_tags_and_notes(folder: Path) -> None:
    runs = read(folder)["run"]
    assert len(runs) == 2 and len({each["run_id"] for each in runs}) == 1
    for each in runs:
        assert each["tags"] == ["small", "test"] and each["notes"] == "read back"
        assert each["config"]["update"]["mix"]["prompts"]["value"] == 6


def test_config_and_policy_are_artifacts_of_the_run(folder: Path) -> None:
    records = read(folder)
    run_id = records["run"][0]["run_id"]
    kept = {each["name"]: each for each in records["artifact"]}
    assert kept[f"{run_id}-config"]["type"] == "config"
    assert kept[f"{run_id}-policy"]["type"] == "model"
    files = {entry["path"] for entry in kept[f"{run_id}-policy"]["manifest"]["contents"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


def test_the_guard_alerts(folder: Path) -> None:
    alerts = read(folder)["alert"]
    assert [each["text"].split(":")[0] for each in alerts] == ["step 1", "step 2", "step 3"]
    assert all("guard.vote_entropy is " in each["text"] for each in alerts)


def test_samples_are_one_growing_table(folder: Path) -> None:
    items = [record["item"] for record in read(folder)["history"]]
    tables = [item for item in items if item.get("samples._type") == "incremental-table-file"]
    found = []
    for file in folder.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"):
        table = json.loads(file.read_text())
        assert table["columns"][:1] == ["step"]
        found += [(row[0], row[table["columns"].index("response")]) for row in table["data"]]
    samples = read_rows(folder / "samples.jsonl")
    assert sorted(found) == sorted((row["step"], row["response"]) for row in samples)
    assert {step for step, _ in found} == {0, 1, 2, 3} == {item["step"] for item in tables}


def test_the_machine_is_watched(folder: Path) -> None:
    (stats, *_) = read(folder)["stats"]
    assert {"memory_percent", "disk./.usagePercent", "proc.memory.rssMB"} <= stats["item"].keys()


def tracked(folder: Path, **tracking: Any) -> Wandb:
    """A tracker of a run folder that has a config and will have a policy."""
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {}\n")
    return Wandb(Config.model_validate(raw_config(folder, tracking=tracking)), folder, False)


def test_an_alert_is_kept_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-of-the-test")
    tracker = tracked(tmp_path / "run", wandb="offline")
    tracker.alert(7, "guard", "drop of 0.1 with s3cr3t-of-the-test")
    tracker.close()
    [alert] = read(tmp_path / "run")["alert"]
    assert alert["title"] == "guard" and alert["level"] == "WARN"
    assert alert["text"] == "step 7: drop of 0.1 with ***"


class Online:
    """What a run that is online is asked for, without one."""

    id, offline = "run-1", False

    def __init__(self) -> None:
        self.used: list[wandb.Artifact] = []
        self.made: list[wandb.Artifact] = []

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact: wandb.Artifact) -> None:
        self.made.append(artifact)

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def finish(self) -> None: ...


def test_online_the_config_is_an_input_of_the_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Online()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = tracked(tmp_path / "run", wandb="online", artifacts=True)
    for name in ("policy", "policy-best"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "config.json").write_text("{}")
    tracker.close()
    assert [(each.name, each.type) for each in run.used] == [("run-1-config", "config")]
    assert [(each.name, each.type) for each in run.made] == [
        ("run-1-policy", "model"),
        ("run-1-policy-best", "model"),
    ]
