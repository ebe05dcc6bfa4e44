"""Credentials that a user has about: none in the run folder, none on the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import raw_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "planted-in-hf-token",
    "HUGGING_FACE_HUB_TOKEN": "planted-in-hub-token",
    "RAY_AUTH_TOKEN": "planted-in-ray-token",
    "JUDGE_API_KEY": "planted-in-judge-key",
}
CONFIGURED, OVERRIDDEN = "planted-in-the-config", "planted-in-an-override"
RAISED, GIT = "planted-in-an-error", "planted-in-a-remote"
SECRETS = [*ENVIRONMENT.values(), CONFIGURED, OVERRIDDEN, RAISED, GIT]
MINE = f"""
import os
calls = 0
def score(prompt, response, answer):
    global calls
    calls += 1
    if calls == 3:
        print("asking with", os.environ["JUDGE_API_KEY"])
        raise OSError("GET https://ann:{RAISED}@host/x: " + os.environ["HF_TOKEN"])
    return 0.5
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run within a git repository whose remote has a password."""
    return subprocess.run(
        [sys.executable, "-m", "ppo_dist", *arguments],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for line in (
        "init -q .",
        f"remote add origin https://ann:{GIT}@host/x.git",
        "-c user.name=a -c user.email=a@b commit -q --allow-empty -m first",
    ):
        subprocess.run(["git", *line.split()], cwd=tmp_path, check=True)
    (tmp_path / "mine.py").write_text(MINE)
    mine = {"kind": "function", "path": str(tmp_path / "mine.py"), "name": "score"}
    pattern = {"kind": "regex", "pattern": f"https://ann:{CONFIGURED}@host/"}
    parts = [{"weight": 1.0, "reward": reward} for reward in (mine, pattern)]
    raw = raw_config(
        tmp_path / "run",
        reward={"verifiable": {"kind": "weighted", "parts": parts}},
        tracking={"wandb": "offline", "progress": True, "samples": 99},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def found(folder: Path, said: str) -> list[str]:
    """Where there is any of the secrets."""
    files = {str(p): p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    texts = {**files, "the terminal": said.encode()}
    return [f"{s} in {name}" for name, text in texts.items() for s in SECRETS if s.encode() in text]


def test_a_run_keeps_none(folder: Path) -> None:
    given = f"reward.labelled={{kind: regex, pattern: 'https://ann:{OVERRIDDEN}@host/'}}"
    result = command(folder, "train", "config.yaml", given)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert found(folder, said) == []
    run = folder / "run"
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert "https://***@host/" in (run / "config.yaml").read_text()
    assert "https://***@host/x: ***" in (run / "events.jsonl").read_text()
    assert "asking with ***" in result.stdout and "https://***@host/x: ***" in result.stderr
    # and it goes on with what it left out of its own config
    again = command(folder, "train", "config.yaml", given, "train.steps=4", "--resume")
    assert again.returncode == 0, again.stderr
    assert found(folder, again.stdout + again.stderr) == []


def test_an_error_tells_none(folder: Path) -> None:
    wrong = command(folder, "train", "config.yaml", f"train.steps=https://a:{OVERRIDDEN}@h")
    assert wrong.returncode == 2 and "train.steps: " in wrong.stderr
    failed = command(folder, "train", "config.yaml", "reward.on_error=error")
    assert failed.returncode == 2 and "reward function failed on " in failed.stderr
    path = folder / "mine.py"
    path.write_text(path.read_text().replace("raise OSError", "raise KeyboardInterrupt"))
    other = command(folder, "train", "config.yaml", "--resume", "tracking.wandb=off")
    assert other.returncode != 0
    for result in (wrong, failed, other):
        assert found(folder, result.stdout + result.stderr) == []


def test_a_fault_of_ours_tells_none(folder: Path) -> None:
    code = (
        "import sys, ppo_dist.run as run, ppo_dist.cli as cli\n"
        f"def train(*_): raise ZeroDivisionError('https://ann:{RAISED}@host')\n"
        "run.train = train\nsys.exit(cli.main(['train', 'config.yaml']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "ZeroDivisionError: https://***@host" in result.stderr
    assert RAISED not in result.stdout + result.stderr
