"""`ppo-dist doctor`: what stands in the way of a run on this machine, or on a cluster."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_dist import device
from ppo_dist.build.workers import before_ray
from ppo_dist.checkup import BUILDS, PACKAGES, installed, look, pinned
from ppo_dist.config import Config, InputError

DISK_SLOW_MB_S, DISK_LITTLE_GB = 50, 20
NEEDED = (*PACKAGES, "vllm")
MANY = 5  # that are named one by one
SHM_LITTLE_GB, OPEN_FILES_FEW, SKEW_S = 2, 65536, 1.0
ROUND_TRIP_BYTES, ROUND_TRIP_S = 2**20, 60.0
HEAD_PORTS = (6379, 8265)  # of launch/ray_head.sh: the cluster's, the job server's

Level = Literal["ok", "warning", "wrong"]
COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Verdict:
    """What was found about one thing, and what to do if it is not well.

    Example: Verdict("open files", "warning", "1,024 at most", "ulimit -n 65536 before Ray starts")
    """

    what: str
    level: Level
    found: str
    fix: str = ""


def doctor(config: Config | None, console: Console) -> int:
    """Prints a verdict on each thing that a run needs. Returns 1 if something is wrong, else 0.

    Raises:
        InputError: the cluster cannot be joined.
    """
    folder = Path(config.run.dir if config else ".").resolve()
    token = f".doctor-{os.getpid()}"
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    with contextlib.suppress(OSError):  # then the folder is judged so
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    try:
        found = look(str(folder), token, _packages(config))
        verdicts = [*judged(found, needs_gpu=_needs_gpu(config)), ports_verdict(HEAD_PORTS)]
        verdicts.append(wandb_verdict(config))
        if config is not None and config.cluster.kind == "ray":
            verdicts += _of_cluster(config, str(folder), token)
    finally:
        with contextlib.suppress(OSError):
            (folder / token).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
    table = Table("", "verdict", "found", "what to do")
    for verdict in verdicts:
        level = Text(verdict.level, COLOURS[verdict.level])
        table.add_row(verdict.what, level, verdict.found, verdict.fix)
    console.print(table)
    return int(any(verdict.level == "wrong" for verdict in verdicts))


def judged(
    found: dict[str, Any],
    versions: dict[str, str] | None = None,
    source: str = "docker/constraints.txt",
    needs_gpu: bool = False,
) -> Iterator[Verdict]:
    """Verdicts on what one machine tells of itself; `versions` are those that it should have."""
    yield _versions(found["versions"], pinned() if versions is None else versions, source)
    yield _device(found, needs_gpu)
    shm = found["shm_gb"]
    little = shm is None or shm < SHM_LITTLE_GB
    size = "none" if shm is None else f"{shm:.1f} GB"
    fix = "docker run --shm-size=8g: Ray's objects are there"
    yield Verdict("/dev/shm", "warning" if little else "ok", size, fix if little else "")
    few = found["open_files"] < OPEN_FILES_FEW
    fix = f"ulimit -n {OPEN_FILES_FEW}, before Ray starts"
    limit = f"{found['open_files']:,} at most"
    yield Verdict("open files", "warning" if few else "ok", limit, fix if few else "")
    yield _disk(found)


def _device(found: dict[str, Any], needs_gpu: bool) -> Verdict:
    level: Level = "wrong" if needs_gpu else "warning"
    torch = found["versions"].get("torch") or ""
    if found["has_driver"] and torch.endswith("+cpu"):
        fix = "install torch's build for CUDA: without the package index for CPUs"
        return Verdict("device", level, f"an NVIDIA driver, and torch {torch}", fix)
    if needs_gpu and not found["has_gpu"]:
        fix = "nvidia-smi: is the driver there, and new enough for torch? Or cluster.device: cpu"
        return Verdict("device", level, found["device"], fix)
    return Verdict("device", "ok", found["device"])


def _disk(found: dict[str, Any]) -> Verdict:
    if not found["sees_folder"]:
        fix = "run.dir must be on storage that all nodes share"
        return Verdict("run folder", "wrong", "not there, or not writable", fix)
    words = f"{found['free_gb']:.0f} GB free, {found['disk_mb_s']:.0f} MB/s written"
    if found["disk_mb_s"] == 0:
        return Verdict("run folder", "wrong", "nothing can be written", "its rights, or its quota")
    if found["free_gb"] < DISK_LITTLE_GB:
        fix = "a checkpoint has 12 bytes a parameter of each trained model, or more"
        return Verdict("run folder", "warning", words, fix)
    if found["disk_mb_s"] < DISK_SLOW_MB_S:
        return Verdict("run folder", "warning", words, "checkpoints will take long: another disk")
    return Verdict("run folder", "ok", words)


def _versions(found: dict[str, str | None], wanted: dict[str, str], by: str) -> Verdict:
    """What a run needs must be there; of all else, what is there must be what is wanted."""
    other = [
        f"{name} {has or 'missing'}, not {wanted[name]}"
        for name, has in found.items()
        if name in wanted
        and (has is not None or name in NEEDED)
        and (has or "").split("+")[0] != wanted[name].split("+")[0]
    ]
    if other:
        words = "; ".join(other[:MANY]) + (f"; {len(other) - MANY} more" if other[MANY:] else "")
        return Verdict("versions", "warning", words, f"install with {by}")
    there = {name: has for name, has in found.items() if has is not None}
    named = [f"{name} {there.pop(name)}" for name in NEEDED if name in there]
    return Verdict("versions", "ok", f"{', '.join(named)}; of {len(there)} other packages too")


def ports_verdict(ports: Sequence[int]) -> Verdict:
    """Whether a Ray head could be started here."""
    taken = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(str(port))
    if taken:
        fix = "is a Ray head running? For another: ray_head.sh --port, --dashboard-port"
        return Verdict("ports", "warning", f"{', '.join(taken)} taken", fix)
    return Verdict("ports", "ok", f"{', '.join(map(str, ports))} are free for a Ray head")


def wandb_verdict(config: Config | None) -> Verdict:
    """Whether metrics will get to W&B."""
    mode = config.tracking.wandb if config else "auto"
    if mode in ("off", "offline"):
        return Verdict("W&B", "ok", f"{mode}: nothing is sent")
    from ppo_dist.tracking.wandb import server

    address = server()
    if address is None:
        level: Level = "wrong" if mode == "online" else "ok"
        return Verdict("W&B", level, "no key: offline", "wandb login, or WANDB_API_KEY")
    import requests

    try:  # as W&B itself asks: through proxies, and with TLS
        requests.head(address, timeout=5)
    except requests.RequestException as error:
        fix = "tracking.wandb: offline, and `wandb sync` later"
        return Verdict("W&B", "warning", f"{address}: {type(error).__name__}", fix)
    return Verdict("W&B", "ok", f"{address} can be reached")


def _of_cluster(config: Config, folder: str, token: str) -> Iterator[Verdict]:
    before_ray(config.cluster)
    from ppo_dist.cluster.layout import layout
    from ppo_dist.cluster.session import nodes, session
    from ppo_dist.cluster.survey import ask, hosts

    with session(config.cluster):
        those = hosts()
        try:
            layout(config, nodes())
            yield Verdict("places", "ok", f"all workers have room on {len(those)} node(s)")
        except InputError as error:
            yield Verdict("places", "wrong", str(error), "more nodes, or fewer workers")
        own = {name: found for name in _packages(config) if (found := installed(name))}
        asked = (folder, token, _packages(config))
        for answer in ask(look, those, [asked] * len(those), ROUND_TRIP_S):
            name = f"node {answer.host.address}"
            if answer.problem is not None:
                yield Verdict(name, "wrong", answer.problem, "see Ray's logs on it")
                continue
            told = answer.value | {"device": f"{answer.host.gpus} GPU(s) for Ray"}
            for verdict in judged(told, own, "this machine's versions"):
                yield Verdict(f"{name}: {verdict.what}", verdict.level, verdict.found, verdict.fix)
            yield clock(name, told["time"], answer.asked, answer.answered)
        yield from _round_trips(those)


def clock(name: str, there: float, asked: float, answered: float) -> Verdict:
    """A node's clock against this one's, as far as a question's time lets it be seen."""
    ahead = max(asked - there, there - answered, 0.0)
    words = f"off by {ahead:.1f} s at least" if ahead else "agrees"
    if ahead > SKEW_S:
        return Verdict(f"{name}: clock", "warning", words, "run an NTP client: logs mislead")
    return Verdict(f"{name}: clock", "ok", words)


def _round_trips(those: Sequence[Any]) -> Iterator[Verdict]:
    """A collective sum over all nodes by gloo, and over those that have GPUs by NCCL."""
    from ppo_dist.cluster.network import round_trip
    from ppo_dist.cluster.survey import ask, free_gpus

    groups: list[tuple[device.DeviceKind, Sequence[Any], bool]] = [("cpu", those, False)]
    if gpus := sum(host.gpus for host in those):
        if free_gpus() == gpus:
            groups.append(("cuda", [host for host in those if host.gpus], True))
        else:
            yield Verdict("nccl", "warning", "not tried: GPUs are in use", "ask again later")
    for kind, members, with_gpu in groups:
        what = f"{device.backend(kind)} between {len(members)} node(s)"
        answers = ask(_free_port, members[:1], [()], ROUND_TRIP_S)
        if answers[0].problem is None:
            at = (members[0].address, answers[0].value, ROUND_TRIP_BYTES, ROUND_TRIP_S)
            arguments = [(kind, rank, len(members), *at) for rank in range(len(members))]
            answers = ask(round_trip, members, arguments, 2 * ROUND_TRIP_S, with_gpu)
        problems = [f"{a.host.address}: {a.problem}" for a in answers if a.problem is not None]
        if problems:
            fix = f"open all ports between the nodes; {device.network_settings(kind)}"
            yield Verdict(what, "wrong", "; ".join(problems), fix)
        else:
            seconds = max(answer.value for answer in answers)
            yield Verdict(what, "ok", f"1 MB summed in {1000 * seconds:.1f} ms")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
    return port


def _needs_gpu(config: Config | None) -> bool:
    """Whether the run's workers will be on this machine, and on GPUs."""
    if config is None or config.cluster.device != "cuda":
        return False
    return config.cluster.kind == "local" or config.cluster.joins is None


def _packages(config: Config | None) -> list[str]:
    """Those that a run needs, and all others whose versions are pinned."""
    has_vllm = config is not None and config.rollout.engine.kind == "vllm"
    rest = [name for name in pinned() if name not in NEEDED and name not in BUILDS.values()]
    return [*PACKAGES, *(["vllm"] if has_vllm else []), *rest]
