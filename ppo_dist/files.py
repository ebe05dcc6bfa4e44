"""Folders that are whole or not there: written aside, summed up in a manifest, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
WRITING, OLD = ".writing", ".old"
DISK_FAULTS = [
    os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
]
REFUSALS = (errno.EACCES, errno.EPERM, errno.ETIMEDOUT)  # faults where they are of a run's file
TORCH_WRITER = "inline_container.cc"  # all that torch says of a file that it could not write


@contextlib.contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end. If the writing fails,
    nothing is left of it.
    """
    made = _aside(folder)
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        yield made
        replace(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


@contextlib.contextmanager
def sealed(folder: Path) -> Iterator[Path]:
    """The same for a checkpoint: it gets a manifest of its files, and is flushed to the disk before
    it has its name.
    """
    with aside(folder) as made:
        yield made
        _seal(made)
    _flush(folder.parent)


def replace(made: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one."""
    old = folder.with_name(f".{folder.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a folder; if that is broken off, what is left does not look like one."""
    doomed = _aside(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def tidy(parent: Path) -> None:
    """Puts right what a process left in a folder that was killed while it wrote: an older folder
    gets its name back if the new one had not taken it yet, all else that is unfinished goes.
    """
    for old in parent.glob(f".*{OLD}"):
        folder = parent / old.name[1 : -len(OLD)]
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
    for unfinished in parent.glob(f".*{WRITING}"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    made = _aside(path)
    try:
        made.write_text(text, encoding="utf-8")
        _flush(made)
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def damage(folder: Path, is_quick: bool = False) -> str | None:
    """What is wrong with a checkpoint, naming the part; None if it is whole and has nothing inside
    that is not its own. A quick look compares sizes alone.
    """
    manifest = folder / MANIFEST
    try:  # a pipe in its place would never end
        listed = json.loads(manifest.read_text(encoding="utf-8") if manifest.is_file() else "")
        expected = {str(name): (told["bytes"], told["sha256"]) for name, told in listed.items()}
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return f"{folder.name}: {MANIFEST} is missing or unreadable"
    name = "a folder in it"
    try:
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        for name, path in found.items():
            if path.is_symlink():
                return f"{folder.name}: {name} is a link"
            if not path.is_dir() and name not in expected and name != MANIFEST:
                return f"{folder.name}: {name} is not in {MANIFEST}"
        for name, (size, _) in expected.items():
            if ".." in name.split("/") or name.startswith("/"):
                return f"{folder.name}: {name} is not inside the folder"
            if name not in found or not found[name].is_file():
                return f"{folder.name}: {name} is missing"
            if found[name].stat().st_size != size:
                return f"{folder.name}: {name} is damaged (its size differs)"
        if is_quick:
            return None
        digests = _digests(found[name] for name in expected)
        for name, (_, digest) in expected.items():
            if next(digests) != digest:
                return f"{folder.name}: {name} is damaged (its checksum differs)"
    except OSError as error:  # a bad sector
        return f"{folder.name}: {name} cannot be read ({error.strerror})"
    return None


def sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file of a folder, by its name in there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }


def disk_fault(error: BaseException, folder: Path | None = None) -> str | None:
    """Why a disk did not take what was written, if that is what an error means, in whatever words
    torch, safetensors or a worker have put it; also if it refused a file in `folder`.
    """
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        following = following.__cause__ or following.__context__
    for cause in causes:
        if folder is not None and _refused(cause, folder):
            return str(cause)
    for line in (line.strip() for cause in causes for line in str(cause).splitlines()):
        if TORCH_WRITER in line:
            return "torch could not write a file"
        if any(fault in line for fault in DISK_FAULTS):
            return line
    return None


def _refused(error: BaseException, folder: Path) -> bool:
    is_one = isinstance(error, OSError) and error.errno in REFUSALS
    name = error.filename if isinstance(error, OSError) else None
    return is_one and isinstance(name, (str, Path)) and Path(name).is_relative_to(folder)


def _seal(made: Path) -> None:
    told = sums(made)
    files, manifest = [made / name for name in told], made / MANIFEST
    manifest.write_text(json.dumps(told, indent=1), encoding="utf-8")
    for path in [*files, manifest, *{p.parent for p in files}, made]:
        _flush(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{WRITING}")


def _digests(paths: Iterable[Path]) -> Iterator[str]:
    """In their order; several files are read at a time, since one processor sums up 1 or 2 GB/s."""
    with ThreadPoolExecutor() as threads:
        yield from threads.map(_digest, paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
