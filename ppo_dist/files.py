"""Folders that are whole or not there: written aside, summed up in a manifest, flushed, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"


def link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace(aside: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def seal(aside: Path, folder: Path) -> None:
    """Writes the manifest of a finished checkpoint, flushes all to disk and gives it its name."""
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    sums = {str(p.relative_to(aside)): _digest(p) for p in files}
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps(sums, indent=1))
    for path in [*files, manifest, *{p.parent for p in files}, aside]:
        _flush(path)
    replace(aside, folder)
    _flush(folder.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the part; None if it is whole."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        sums = None
    if not isinstance(sums, dict):
        return f"{folder.name}: {MANIFEST} is missing or unreadable"
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{folder.name}: {name} is missing"
        if _digest(path) != digest:
            return f"{folder.name}: {name} is damaged (its checksum differs)"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
