"""What a Dockerfile does, without a Docker engine: its base image is a Debian by debootstrap, and
its steps run in a chroot, in namespaces of their own, so that nothing stays mounted.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

PYTHON = ("python3.11-dev", "python3.11-venv")  # as in the image python:3.11-bookworm
# how this machine reaches its package indexes
NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/apt", "/etc/pip.conf", "/etc/xdg")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


def missing() -> str:
    """Why there can be no clean root here; empty if there can."""
    absent = [name for name in ("debootstrap", "unshare") if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} of Debian"
    return "" if os.geteuid() == 0 else "chroot needs root"


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Such as ("COPY", "launch launch"), in order."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, rest = line.split(maxsplit=1)
            yield word, " ".join(rest.split())


def context(root: Path, ignore: Path) -> list[Path]:
    """The files under `root` that are sent to the engine: here rules name what is not ignored."""
    rules = [line.strip() for line in ignore.read_text().splitlines() if line.strip()]
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    dropped = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    assert rules[0] == "*" and len(kept) + len(dropped) + 1 == len(rules), "read as written here"
    found: list[Path] = []
    for name in kept:
        path = root / name
        found += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return [
        path
        for path in found
        if not any(fnmatch.fnmatch(part, rule) for part in path.parts for rule in dropped)
    ]


class Stage:
    """One stage of a build: a root folder, and what the instructions so far have set."""

    def __init__(self, root: Path, args: dict[str, str]) -> None:
        self.root, self._args = root, args
        self._env: dict[str, str] = {}
        self._workdir, self._user, self._shell = "/", "0", ["/bin/sh", "-c"]

    def do(self, word: str, rest: str, files: list[Path], source: Path, stages: dict) -> None:
        """Does one instruction."""
        if word == "ARG":
            name, _, default = rest.partition("=")
            self._args.setdefault(name, default)
        elif word == "ENV":
            for name, value in re.findall(r"(\w+)=(\S*)", rest):
                self._env[name] = self._filled(value)
        elif word == "SHELL":
            self._shell = json.loads(rest)
        elif word == "WORKDIR":
            self._workdir = rest
            self._inside(rest).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            self._user = rest
        elif word == "COPY":
            self._copy(rest.split(), files, source, stages)
        elif word == "RUN":
            self.run(*self._shell, rest)

    def run(self, *command: str) -> str:
        """What a command prints in here.

        Raises:
            AssertionError: it failed.
        """
        mount = 'mount -t proc proc "$0/proc"; '
        mount += "".join(f'mount --rbind {name} "$0{name}"; ' for name in ("/dev", "/sys"))
        for folder in _folders_of_indexes():
            inside = self.root / folder.relative_to("/")
            inside.mkdir(parents=True, exist_ok=True)
            mount += f'mount --bind {folder} "$0{folder}"; '
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec")
        chroot = f'exec chroot --userspec={self._user}:{self._user} "$0" "$@"'
        told = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        env = {"PATH": PATH, "HOME": "/root" if self._user == "0" else "/home/ppo", **told}
        done = subprocess.run(
            [*apart, mount + chroot, self.root, "env", "--chdir", self._workdir, *command],
            env={**env, **self._env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def _copy(self, words: list[str], files: list[Path], source: Path, stages: dict) -> None:
        *names, target = [word for word in words if not word.startswith("--from=")]
        place = self._inside(target)
        if words[0].startswith("--from="):
            other = stages[words[0].removeprefix("--from=")].root / names[0].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            return _linked(other, place)
        for name in names:
            wanted = [f for f in files if f == source / name or (source / name) in f.parents]
            assert wanted, f"COPY {name}: not in the context"
            for file in wanted:
                rest = file.relative_to(source / name)
                into = place / (file.name if file == source / name else rest)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, into)

    def _inside(self, path: str) -> Path:
        return self.root / str(Path(self._workdir, path)).lstrip("/")

    def _filled(self, value: str) -> str:
        known = {**self._args, "PATH": PATH, **self._env}
        return re.sub(r"\$\{?(\w+)\}?", lambda m: known.get(m.group(1), ""), value)


def build(dockerfile: Path, source: Path, folder: Path, args: dict[str, str]) -> Stage:
    """Does all of it; returns the last stage."""
    files = context(source, dockerfile.with_name(f"{dockerfile.name}.dockerignore"))
    base = folder / "base"
    debian = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm"]
    subprocess.run([*debian, base], check=True, stdout=subprocess.DEVNULL)
    for path in map(Path, (*NETWORK, AUTHORITIES)):
        if path.exists():
            into = base / path.relative_to("/")
            subprocess.run(["cp", "--archive", "--no-target-directory", path, into], check=True)
    first = Stage(base, {})
    first.run("apt-get", "update")
    first.run("apt-get", "install", "--yes", "--no-install-recommends", *PYTHON)
    stages: dict[str, Stage] = {}
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            origin, _, name = rest.partition(" AS ")
            root = folder / f"stage-{len(stages)}"
            below = stages[origin].root if origin in stages else base
            _linked(below, root)
            stages[name] = stage = Stage(root, dict(args))
        else:
            stage.do(word, rest, files, source, stages)
    return stage


def _linked(folder: Path, copy: Path) -> None:
    """A copy by hard links, in no time: what installs packages replaces files, and changes none."""
    subprocess.run(["cp", "--archive", "--link", "--no-target-directory", folder, copy], check=True)


def _folders_of_indexes() -> set[Path]:
    """Folders of this machine that its pip takes packages from."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = re.split(r"[\s'=]+", told)
    paths = [Path(urlsplit(word).path) for word in words if word.startswith(("file:///", "/"))]
    return {path for path in paths if path.is_dir()}
