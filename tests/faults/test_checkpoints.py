"""Real checkpoints that are damaged, each file in each way, and disks that fill."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ppo_dist import files
from ppo_dist.config import Config, InputError, RunError
from ppo_dist.coordinator.state import Checkpoints
from ppo_dist.learner.roles import Roles
from ppo_dist.learner.worker import LearnerWorker
from ppo_dist.run import train
from ppo_dist.tracking.local import JsonLines, read_rows
from tests.conftest import raw_config
from tests.e2e.test_run import numbers

pytestmark = pytest.mark.slow
SUPERVISED = {"kind": "supervised_first", "steps": 1, "then": 0.5}


def raw(folder: Path, steps: int = 4, **sections: Any) -> dict[str, Any]:
    """The reference is reset after the first step, and every step has a checkpoint."""
    train_keys = {"steps": steps, "checkpoint_every": 1, "keep_checkpoints": 9}
    return raw_config(
        folder,
        **{"train": train_keys, "mix": {"schedule": SUPERVISED}, "eval": {"every": 1}, **sections},
    )


def run(made: dict[str, Any], resume: bool | Path = False) -> int:
    return train(Config.model_validate(made), resume, Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(raw(folder)) == 0
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "is damaged (its checksum differs)"),
    "cut off": (lambda p: os.truncate(p, p.stat().st_size // 2), "is damaged (its size differs)"),
    "empty": (lambda p: os.truncate(p, 0), "is damaged (its size differs)"),
    "gone": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_file_is_watched(whole: Path, tmp_path: Path, harm: str) -> None:
    """State, manifest, DeepSpeed's shards of policy and critic, random states, reference."""
    do, said = HARMS[harm]
    newest = whole / "checkpoints" / "step-00000004"
    names = [p.relative_to(newest) for p in sorted(newest.rglob("*")) if p.is_file()]
    kinds = {"state.json", "manifest.json", "model.safetensors", "reinforced"}
    assert kinds <= {name.name for name in names}
    assert any(name.name.startswith("random-0") for name in names)
    assert {"policy", "critic", "reference"} <= {name.parts[0] for name in names}
    for name in names:
        if name.name == "reinforced" and harm != "gone":
            continue  # it is empty: there is nothing to harm
        folder = tmp_path / "run"
        copied = folder / "checkpoints" / "step-00000004"
        shutil.copytree(newest, copied)
        shutil.copytree(newest.with_name("step-00000003"), copied.with_name("step-00000003"))
        do(copied / name)
        if name.name == files.MANIFEST:
            problem = "step-00000004: manifest.json is missing or unreadable"
            if harm == "flipped":  # one of the digests in it, or of the names
                problem = str(files.damage(copied))
        else:
            problem = f"step-00000004: {name} {said}"
        chosen, problems = Checkpoints(folder, 2).newest_whole()
        assert chosen == copied.with_name("step-00000003") and problems == [problem], name
        with pytest.raises(InputError) as error:
            run(raw(folder, 5), resume=copied)
        assert str(error.value) == f"cannot resume from {copied}: {problem}"
        shutil.rmtree(folder)


def test_without_a_whole_one_there_is_no_resuming(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        flip(checkpoint / "state.json")
    with pytest.raises(InputError, match="run: no checkpoint is whole"):
        run(raw(folder), resume=True)
    assert len(list((folder / "checkpoints").iterdir())) == 4, "they are left as they are"


def test_a_reference_that_rots_spoils_no_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that hold it already nor the next, and the run gets it back from them."""
    folder = tmp_path / "run"
    reference = folder / "reference" / "model.safetensors"
    with monkeypatch.context() as patched:
        when(patched, LearnerWorker, "save_checkpoint", 3, lambda: flip(reference))
        with pytest.raises(RunError, match="run/reference: the reference is damaged on the disk"):
            run(raw(folder))
    assert Checkpoints(folder, 9).newest_whole() == (folder / "checkpoints" / "step-00000002", [])
    assert run(raw(folder), resume=True) == 0
    assert numbers(folder) == numbers(whole)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("a small disk of its own can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Takes all but `left` bytes of what is free."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(free - left, 0)))


def when(
    patched: pytest.MonkeyPatch, owner: Any, name: str, which: int | str, do: Callable[[], None]
) -> None:
    """Does something right before the call of that number (from 1) of a method or function, or
    before the first one for a folder of that name.
    """
    original, calls = vars(owner)[name], 0

    def before(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        is_it = args[-1].name == which if isinstance(which, str) else calls == which
        if is_it:
            do()
        return original(*args, **kwargs)

    patched.setattr(owner, name, before)


# (what writes, its call during or after step 3, bytes that are left then)
MOMENTS: dict[str, tuple[Any, str, int | str, int]] = {
    "policy's shards": (LearnerWorker, "save_checkpoint", 3, 20_000),
    "later shards": (LearnerWorker, "save_checkpoint", 3, 400_000),
    "first folder": (LearnerWorker, "save_checkpoint", 3, 0),
    "manifest": (files, "_seal", 3, 0),
    "metrics": (JsonLines, "log", 4, 0),
    "samples": (JsonLines, "table", 6, 0),
    "final policy": (Roles, "save_policy", "policy", 10_000),
    "reference": (Roles, "save_policy", "reference", 10_000),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_one_clear_error_and_costs_nothing_older(
    whole: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = disk / "run"
    owner, name, which, left = MOMENTS[moment]
    with monkeypatch.context() as patched:
        when(patched, owner, name, which, lambda: fill(disk, left))
        with pytest.raises(RunError) as error:
            run(raw(folder))
    said = str(error.value)
    assert said.startswith(f"{folder}: cannot be written: ") and "\n" not in said
    assert "MB are free on its disk" in said
    left_over = [p.name for p in folder.rglob(".*") if p.name != ".lock"]
    assert not [n for n in left_over if n.endswith((".writing", ".old"))]
    for checkpoint in (folder / "checkpoints").glob("*"):
        assert files.damage(checkpoint) is None
    if moment != "reference":
        assert "a checkpoint takes" in said
        assert Checkpoints(folder, 9).newest_whole()[0] is not None
    (disk / "ballast").unlink()
    assert run(raw(folder), resume=True) == 0
    assert numbers(folder) == numbers(whole)
    failed = [e for e in read_rows(folder / "events.jsonl") if e["event"] == "failed"]
    assert len(failed) <= 1, "the line is there if there was room for it"


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_the_command_says_it_in_one_line(disk: Path, kind: str) -> None:
    folder = disk / "run"
    path = disk.parent / "config.yaml"
    (disk / "ballast").write_bytes(bytes(14_500_000))  # there is room for a checkpoint or two
    path.write_text(yaml.safe_dump(raw(folder, 9, cluster={"kind": kind})))
    command = [sys.executable, "-m", "ppo_dist", "train", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ppo-dist")]
    assert line.startswith(f"ppo-dist: {folder}: cannot be written: ")
    assert "`--resume` goes on from the last checkpoint" in line
    assert "Traceback" not in result.stderr
    chosen, problems = Checkpoints(folder, 9).newest_whole()
    assert chosen is not None and problems == []
    (disk / "ballast").unlink()
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stderr
