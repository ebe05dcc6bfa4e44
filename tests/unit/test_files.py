"""Folders that are whole or not there, whatever is put into them and whenever a writer dies."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppo_dist import files
from ppo_dist.coordinator.state import Checkpoints, RunState


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("not the checkpoint's")
    with files.sealed(tmp_path / "step-1") as made:
        (made / "inner").mkdir()
        (made / "inner" / "weights.bin").write_bytes(bytes(range(256)))
        (made / "state.json").write_text("{}")
    return tmp_path / "step-1"


def manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    sums = json.loads((folder / files.MANIFEST).read_text())
    change(sums)
    (folder / files.MANIFEST).write_text(json.dumps(sums))


@pytest.mark.parametrize("name", ["../secret.txt", "inner/../../secret.txt", "/etc/hostname", ".."])
def test_a_manifest_that_points_outside_is_refused(sealed: Path, name: str) -> None:
    outside = sealed / name
    told = {"bytes": outside.stat().st_size, "sha256": ""}
    if outside.is_file():
        told["sha256"] = files._digest(outside)
    manifest(sealed, lambda sums: sums.update({name: told}))
    assert files.damage(sealed) == f"step-1: {name} is not inside the folder"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "inner"])
def test_names_that_are_no_files(sealed: Path, name: str) -> None:
    manifest(sealed, lambda sums: sums.update({name: {"bytes": 0, "sha256": ""}}))
    assert files.damage(sealed) == f"step-1: {name} is missing"


def test_what_the_manifest_does_not_list_is_refused(sealed: Path) -> None:
    (sealed / "inner" / "more.pt").write_bytes(b"a pickle")
    assert files.damage(sealed) == "step-1: inner/more.pt is not in manifest.json"


@pytest.mark.parametrize("target", ["../secret.txt", "inner/weights.bin", "nowhere"])
def test_links_are_refused(sealed: Path, target: str) -> None:
    (sealed / "link").symlink_to(target)
    assert files.damage(sealed) == "step-1: link is a link"


def test_a_link_in_the_place_of_a_file_or_a_folder_is_refused(sealed: Path) -> None:
    inner = sealed / "inner"
    (inner / "weights.bin").rename(sealed.parent / "weights.bin")
    (inner / "weights.bin").symlink_to(sealed.parent / "weights.bin")
    assert files.damage(sealed) == "step-1: inner/weights.bin is a link"
    (inner / "weights.bin").unlink()
    (sealed.parent / "weights.bin").rename(inner / "weights.bin")
    inner.rename(sealed.parent / "elsewhere")
    inner.symlink_to(sealed.parent / "elsewhere")
    assert files.damage(sealed) == "step-1: inner is a link"


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(sealed: Path) -> None:
    (sealed / "state.json").unlink()
    os.mkfifo(sealed / "state.json")
    assert files.damage(sealed) == "step-1: state.json is missing"


@pytest.mark.parametrize("told", [7, None, [1, 2], {"bytes": 256}, "9f2c"])
def test_a_manifest_of_another_kind(sealed: Path, told: Any) -> None:
    manifest(sealed, lambda sums: sums.update({"inner/weights.bin": told}))
    assert files.damage(sealed) == "step-1: manifest.json is missing or unreadable"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").touch()
    with pytest.raises(KeyboardInterrupt), files.aside(tmp_path / "policy") as made:
        (made / "half").touch()
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["policy", "old"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    files.write_text(path, "a: 1\n")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "a: \ud800")
    assert path.read_text() == "a: 1\n" and list(tmp_path.iterdir()) == [path]


def test_tidying_takes_back_what_had_lost_its_name(tmp_path: Path) -> None:
    """As if a process was killed between the two renames, after them, and while it wrote."""
    for name in (".policy.old", ".policy.writing", ".reference.old", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".config.yaml.writing").write_text("half")
    (tmp_path / ".lock").touch()
    files.tidy(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"policy", "reference", ".lock"}
    assert (tmp_path / "policy" / "file").read_text() == ".policy.old"
    assert (tmp_path / "reference" / "file").read_text() == "reference"


def test_a_disk_that_is_full_is_told_in_whatever_words() -> None:
    full = OSError(28, os.strerror(28), "/x")
    hidden = RuntimeError("PytorchStreamWriter failed")
    hidden.__context__ = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
    remote = RuntimeError(f"ray::save()\n  File …\nSafetensorError: I/O error: {os.strerror(28)}")
    assert files.disk_fault(full) == "[Errno 28] No space left on device: '/x'"
    assert files.disk_fault(hidden) == "torch could not write a file"
    assert files.disk_fault(remote) == "SafetensorError: I/O error: No space left on device"
    assert files.disk_fault(ValueError("no space")) is None
    refused = PermissionError(errno.EACCES, "Permission denied", "/x/y")
    assert files.disk_fault(refused, Path("/x")) == "[Errno 13] Permission denied: '/x/y'"
    assert files.disk_fault(refused, Path("/z")) is None, "not of this run"
    socket = PermissionError(errno.EACCES, "Permission denied")
    assert files.disk_fault(socket, Path("/x")) is None
    assert files.disk_fault(OSError(errno.ESTALE, os.strerror(errno.ESTALE))) is not None


def write(run: Path, keep: int, step: int, best: int | None = None) -> Path:
    return Checkpoints(run, keep).write(
        RunState(step=step, best_step=best),
        {},
        lambda folder: (folder / "weights.bin").write_bytes(bytes(9)),
    )


def steps(run: Path) -> list[int]:
    return [int(p.name[-8:]) for p in sorted((run / "checkpoints").iterdir())]


@pytest.mark.parametrize("harm", ["cut off", "missing", "no manifest"])
def test_pruning_counts_whole_checkpoints_alone(tmp_path: Path, harm: str) -> None:
    """With two to keep, one that lost a part does not push out an older one that is whole."""
    write(tmp_path, 2, 1)
    broken = write(tmp_path, 2, 2)
    match harm:
        case "cut off":
            (broken / "weights.bin").write_bytes(b"1")
        case "missing":
            (broken / "state.json").unlink()
        case "no manifest":
            (broken / files.MANIFEST).unlink()
    write(tmp_path, 2, 3)
    assert steps(tmp_path) == [1, 2, 3]
    write(tmp_path, 2, 4)
    assert steps(tmp_path) == [3, 4], "and it does not stay for ever"


@pytest.mark.parametrize("where", ["weights.bin", "a folder in it"])
def test_an_older_checkpoint_is_tried_where_the_disk_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    older, newer = write(tmp_path, 2, 1), write(tmp_path, 2, 2)
    owner, name = (files, "_digest") if where == "weights.bin" else (Path, "rglob")
    real = vars(owner)[name]

    def read(path: Path, *args: Any) -> Any:
        if path in (newer, newer / "weights.bin"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args)

    monkeypatch.setattr(owner, name, read)
    problem = f"step-00000002: {where} cannot be read (Input/output error)"
    assert Checkpoints(tmp_path, 2).newest_whole() == (older, [problem])


def test_the_best_outlives_the_newest(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, 1, step, best=2)
    assert steps(tmp_path) == [2, 4]


def test_a_removal_that_is_broken_off_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, 1, 1)
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        files.remove(folder)
    assert Checkpoints(tmp_path, 1).newest_whole() == (None, [])
    files.tidy(tmp_path / "checkpoints")
    assert steps(tmp_path) == []
