"""What is found is judged, and each fault has its fix."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_dist.config import Config
from ppo_dist.doctor import _pinned, clock, doctor, judged, look, ports_verdict, wandb_verdict
from ppo_dist.tracking.wandb import has_key
from tests.conftest import raw_config


def test_a_machine_tells_of_itself(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    found = look(str(tmp_path), "token")
    assert found["versions"]["ppo_dist"] and found["versions"]["torch"]
    assert found["disk_mb_s"] > 0 and found["free_gb"] > 0 and found["open_files"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"token"}, "nothing is left there"
    assert not look(str(tmp_path), "other")["sees_folder"]


FINE = {
    "versions": {"torch": f"{_pinned()['torch']}+cpu", "ray": _pinned()["ray"]},
    "device": "CPU, 2 cores",
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
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
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
