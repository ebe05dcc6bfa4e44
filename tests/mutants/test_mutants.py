"""Each patch here breaks one formula in one place; the tests that it names must fail with it.

`launch/test.sh tests/mutants -m slow` runs all of them, each on a copy of the project.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATCHES = sorted(HERE.glob("*.patch"))
PARTS = ("ppo_dist", "tests", "pyproject.toml")
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow")
MARK = "# Killed by: "
TESTS_FAILED = 1  # pytest's exit code; others mean that it could not run them


def copy(folder: Path) -> None:
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.patch")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder)


def run_tests(folder: Path, patch: Path) -> subprocess.CompletedProcess[str]:
    (line,) = [line for line in patch.read_text().splitlines() if line.startswith(MARK)]
    return subprocess.run(
        [*PYTEST, *line.removeprefix(MARK).split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_there_are_enough() -> None:
    assert len(PATCHES) >= 30


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_patches_apply(patch: Path) -> None:
    checked = subprocess.run(
        ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, f"the code has moved on: {checked.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_no_mutant_survives(patch: Path, tmp_path: Path) -> None:
    copy(tmp_path)
    applied = subprocess.run(
        ["git", "apply", str(patch)],
        cwd=tmp_path,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        capture_output=True,
        text=True,
    )
    assert applied.returncode == 0, applied.stderr
    result = run_tests(tmp_path, patch)
    assert result.returncode == TESTS_FAILED, (result.returncode, result.stdout[-2000:])


@pytest.mark.slow
def test_without_a_patch_they_pass(tmp_path: Path) -> None:
    """The copy itself is sound, so it is the patches that make tests fail."""
    copy(tmp_path)
    result = run_tests(tmp_path, PATCHES[0])
    assert result.returncode == 0, result.stdout[-2000:]
