"""Sends runs to a Ray cluster as jobs: what `ppo-dist submit` does.

The job is `ppo-dist train` in a copy of the working directory, on the cluster's head or wherever
the resources asked for are; it joins the cluster by the RAY_ADDRESS that Ray sets for it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ppo_dist.config import Config, InputError
from ppo_dist.config.load import load
from ppo_dist.follow import LAST_WORD, Follower, say_how_to_go_on

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NEAREST = "http://127.0.0.1:8265"
# beside what .gitignore and .rayignore leave out; the slashes keep ppo_dist/models/
EXCLUDED = [".git", ".venv", "__pycache__", "/runs", "/models", "/wandb"]
CONNECT_S = 10
PINNED = ("ppo_dist", "ray", "torch", "deepspeed", "transformers")  # what numbers depend on
SENT_WITH = "PPO_DIST_SENT_WITH"  # their versions, among a job's variables


@dataclass(frozen=True)
class Submission:
    """A run to be sent, and how.

    Example: Submission(config=Path("configs/quickstart.yaml"), overrides=["run.dir=/shared/q"],
    resume=False, address="http://10.0.0.5:8265", working_dir=Path("."), env=["WANDB_API_KEY"],
    entrypoint_cpus=1.0, entrypoint_gpus=None, entrypoint_memory=None, stop_wait=600)
    """

    config: Path
    overrides: list[str]
    resume: bool
    address: str
    working_dir: Path
    env: list[str]
    entrypoint_cpus: float | None
    entrypoint_gpus: float | None
    entrypoint_memory: float | None
    stop_wait: int


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `ppo-dist submit` beside config and overrides."""
    command.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", NEAREST),
        metavar="URL",
        help=f"job server (default: RAY_API_SERVER_ADDRESS, else {NEAREST})",
    )
    command.add_argument(
        "--follow",
        action="store_true",
        help="show the log and return the run's exit code; Ctrl-C asks whether the run shall stop",
    )
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    command.add_argument(
        "--working-dir",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="what is sent, but for .git, .venv, runs, models and ignored files (default: here)",
    )
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="a variable to take along"
    )
    for name, meaning in (("cpus", "CPUs"), ("gpus", "GPUs"), ("memory", "GB of memory")):
        command.add_argument(
            f"--entrypoint-{name}", type=float, metavar="N", help=f"{meaning} for the coordinator"
        )
    command.add_argument(
        "--stop-wait",
        type=int,
        default=600,
        metavar="SECONDS",
        help="how long a run that is told to stop may take for its checkpoint (default: 600)",
    )


def submit(run: Submission, is_followed: bool) -> int:
    """Sends a run as a job. Returns 0 once it is sent or, if it is followed, the run's exit code.

    Raises:
        InputError: the config is wrong or cannot run there, a variable is not set, or the cluster
            cannot be reached or refuses the token; nothing was sent.
    """
    config = load(run.config, run.overrides)
    entrypoint = _entrypoint(run, config)
    own = {SENT_WITH: _pinned(), "RAY_JOB_STOP_WAIT_TIME_S": str(run.stop_wait)}
    runtime_env = {
        "working_dir": str(run.working_dir),
        "excludes": EXCLUDED,
        "env_vars": {**_values(run.env), **own},
    }
    memory = run.entrypoint_memory
    with _connected(run.address) as client:
        job = client.submit_job(
            entrypoint=entrypoint,
            runtime_env=runtime_env,
            entrypoint_num_cpus=run.entrypoint_cpus,
            entrypoint_num_gpus=run.entrypoint_gpus,
            entrypoint_memory=None if memory is None else int(memory * 1e9),
        )
        print(f"submitted {job} to {run.address}", flush=True)
        if is_followed:
            return Follower(client, job, run.address).to_the_end()
    say_how_to_go_on(job, run.address)
    return 0


def check_versions() -> None:
    """Whether a run that was sent here has the versions that its config was checked with.

    Raises:
        InputError: it was sent, and has not.
    """
    there = os.environ.get(SENT_WITH)
    if there is not None and there != (here := _pinned()):
        raise InputError(
            f"this run was sent with {there}, and the cluster has {here}: install both with "
            "docker/constraints.txt"
        )


def _pinned() -> str:
    """Such as "ppo_dist 0.1.0, ray 2.60.0, torch 2.13.0", whatever torch was built for."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in PINNED)


def _entrypoint(run: Submission, config: Config) -> str:
    """The job's shell command. Its last line of output tells how the run ended, also where a stop
    reaches the shell itself, of which Ray keeps no exit code.
    """
    if not Path(config.run.dir).is_absolute():
        raise InputError(
            f"run.dir {config.run.dir}: must be an absolute path for a submitted run, on storage "
            "that the cluster's nodes share: a job's working directory goes with it"
        )
    sections = {"model": config.model, "reference": config.reference, "critic": config.critic}
    for key, section in sections.items():
        if section is not None and section.path is not None and _is_left_behind(section.path):
            raise InputError(
                f"{key}.path {section.path}: folders of models do not go with the working "
                "directory: an absolute path that all nodes have, or a name on the hub"
            )
    folder, path = run.working_dir.resolve(), run.config.resolve()
    if not folder.is_dir():
        raise InputError(f"{run.working_dir}: no such working directory")
    if not path.is_relative_to(folder):
        raise InputError(f"{run.config}: is not inside the working directory {folder}")
    command = ["ppo-dist", "train", str(path.relative_to(folder)), *run.overrides]
    command += ["--resume"] if run.resume else []
    return f'trap : TERM; {shlex.join(command)}; code=$?; echo "{LAST_WORD}$code"; exit $code'


def _is_left_behind(path: str) -> bool:
    return not Path(path).is_absolute() and (path.startswith(".") or Path(path).is_dir())


def _values(names: list[str]) -> dict[str, str]:
    """Variables of this environment, for the job's."""
    found = {}
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(
                "--env takes names of variables; their values are those of this environment"
            )
        if name not in os.environ:
            raise InputError(f"--env {name}: is not set in this environment")
        if "$" in os.environ[name]:
            raise InputError(f"--env {name}: its value has a $, which Ray would expand")
        found[name] = os.environ[name]
    return found


@contextlib.contextmanager
def _connected(address: str) -> Iterator[JobSubmissionClient]:
    """A client with the token of this environment; whatever keeps it from its work is an
    InputError.
    """
    host, port = _parts(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers a variable to its argument
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        _try_to_reach(host, port)
        yield JobSubmissionClient(address)
    except AuthenticationError as error:
        fault = "refuses this token" if "failed" in str(error) else "needs a token"
        raise InputError(
            f"{address}: {fault}: set RAY_AUTH_TOKEN to the cluster's own, or RAY_AUTH_TOKEN_PATH "
            "to a file with it (default: ~/.ray/auth_token)"
        ) from None
    except (requests.RequestException, ConnectionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{address}: no Ray job server can be reached there: {reason}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "status code 413" in reason:
            raise InputError(
                "the working directory is larger than the cluster takes: leave out what the run "
                "does not need in a .rayignore file, or choose another --working-dir"
            ) from None
        raise InputError(f"{address}: the Ray job server says: {reason}") from None


def _parts(address: str) -> tuple[str, int]:
    """Host and port of a URL."""
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    raise InputError(f"{address}: the job server's address is written {NEAREST}")


def _try_to_reach(host: str, port: int) -> None:
    """The client itself would wait for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(str(error)) from None
