"""Runs that are rewarded by a server: where it fails, either nothing changes or it is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ppo_dist.cli import main
from ppo_dist.config import Config
from ppo_dist.run import train
from tests.conftest import raw_config
from tests.e2e.test_run import numbers
from tests.reward_server import Handler, RewardServer, healthy

SECRET = "s3cr3t-t0ken"


def rewarded(folder: Path, url: str, **keys: Any) -> dict[str, Any]:
    """Two steps, rewarded by a server for verifiable prompts and in the evaluations."""
    quick = {"batch": 4, "concurrency": 3, "backoff_s": 0.01, "timeout_s": 5.0}
    judge = {"kind": "remote", "url": url, **quick, **keys}
    return raw_config(
        folder,
        train={"steps": 2},
        eval={"every": 2},
        reward={"verifiable": judge, "labelled": judge},
        algorithm={"advantage": "group_mean"},
        rollout={"group_size": 4},
    )


def run(raw: dict[str, Any]) -> int:
    return train(Config.model_validate(raw), False, Console(quiet=True))


def flaky(handler: Handler) -> None:
    """Each request fails once, in one of four ways."""
    if handler.tries == 1 and handler.asked["items"]:
        match int(handler.asked["id"], 16) % 4:
            case 0:
                handler.reply(b"", 503)
            case 1:
                handler.close_connection = True
            case 2:
                handler.reply(b"<html>")
            case _:
                handler.reply(handler.scores(id="0"))
    else:
        healthy(handler)


def test_a_flaky_server_changes_no_number(tmp_path: Path) -> None:
    with RewardServer() as well, RewardServer(flaky) as ill:
        assert run(rewarded(tmp_path / "well", well.url)) == 0
        assert run(rewarded(tmp_path / "ill", ill.url)) == 0
    assert len(ill.seen) == 2 * len(well.seen) - 2, "each request twice, but for the two probes"
    told = numbers(tmp_path / "ill")
    assert told == numbers(tmp_path / "well")
    assert [row["reward/dropped"] for row in told] == [None, 0.0, 0.0]
    assert 0 < told[1]["reward/verifiable/mean"] < 1
    assert told[0]["eval/held_out/dropped"] == 0.0


def choosy(handler: Handler) -> None:
    """Refuses one text in five or so."""
    if any(len(i["prompt"] + i["response"]) % 5 == 0 for i in handler.asked["items"]):
        handler.reply(b"", 400)
    else:
        healthy(handler)


def test_what_a_server_does_not_judge_is_dropped_and_told(tmp_path: Path) -> None:
    with RewardServer(choosy) as server:
        assert run(rewarded(tmp_path / "run", server.url, batch=1, on_failure="drop")) == 0
    first, *steps = numbers(tmp_path / "run")
    for row in steps:
        assert 0 < row["reward/dropped"] < 24 and row["semi/policy_tokens/verifiable"] > 0
    assert first["eval/held_out/dropped"] > 0
    alerts = [json.loads(e) for e in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    said = f"{steps[0]['reward/dropped']:.0f}: reward server {server.url}: status 400 Bad Request"
    assert said in [event.get("text") for event in alerts]


def command(folder: Path, raw: dict[str, Any], *more: str) -> int:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return main(["train", str(path), *more])


def test_a_server_that_fails_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; the token is nowhere in the run's folder; with the server back it goes on."""
    monkeypatch.setenv("JUDGE", SECRET)

    def dying(handler: Handler) -> None:
        if len(handler.server.seen) > 8:
            handler.reply(str(handler.headers).encode(), 500, X_Echo=SECRET)
        else:
            healthy(handler)

    folder = tmp_path / "run"
    with RewardServer(dying) as server:
        raw = rewarded(folder, server.url, token_env="JUDGE", attempts=2)
        assert command(tmp_path, raw) == 1
        told = capsys.readouterr().err
        why = f"reward server {server.url}: status 500 Internal Server Error, asked 2 times"
        assert told == f"ppo-dist: {why} (`--resume` goes on from the last checkpoint)\n"
        kept = [path for path in folder.rglob("*") if path.is_file()]
        assert kept and not any(SECRET.encode() in path.read_bytes() for path in kept)
        failed = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
        assert (failed["event"], failed["reason"]) == ("failed", why)
        server.behave = healthy
        assert command(tmp_path, raw, "--resume") == 0
    assert numbers(folder)[-1]["step"] == 2


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
def test_a_server_that_is_not_there_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    with RewardServer() as server:
        pass
    raw = rewarded(tmp_path / "run", server.url)
    raw["reward"]["labelled"] = "exact"
    assert command(tmp_path, raw, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    why = r"cannot be reached \(Connection refused\), asked 2 times"
    assert re.fullmatch(rf"ppo-dist: reward\.verifiable: reward server {server.url}: {why}", line)
    assert not (tmp_path / "run").exists()
    raw["reward"]["verifiable"]["token_env"] = "NOT_THERE"
    assert command(tmp_path, raw, *more) == 2
    assert "environment variable NOT_THERE (token_env) is not set" in capsys.readouterr().err
