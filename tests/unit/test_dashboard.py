"""The dashboard's spec, offline: every key of a run once, in the section of its group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_dist.cli import main
from ppo_dist.config import Config
from ppo_dist.tracking.dashboard import spec
from ppo_dist.tracking.metrics import keys
from tests.conftest import raw_config


def sections(found: dict[str, Any]) -> dict[str, list[str]]:
    """Metrics by section."""
    banks = found["section"]["panelBankConfig"]["sections"]
    return {
        bank["name"]: [m for panel in bank["panels"] for m in panel["config"].get("metrics", [])]
        for bank in banks
    }


@pytest.mark.parametrize("has_unlabelled", [False, True])
def test_every_key_is_in_one_panel(tmp_path: Path, has_unlabelled: bool) -> None:
    more: dict[str, Any] = {}
    if has_unlabelled:
        words = raw_config(tmp_path)["data"]["labelled"]
        more = {
            "data": {"unlabelled": {**words, "seed": 5}},
            "reward": {"unlabelled": "vote"},
            "mix": {"shares": {"labelled": 1, "unlabelled": 1}},
            "semi": {"pseudo": {"batch": 2}, "probe": 0.3},
            "rollout": {"group_size": 3},
        }
    config = Config.model_validate(raw_config(tmp_path, **more))
    found = sections(spec(config))
    assert ("pseudo" in found) == has_unlabelled
    assert sorted(m for own in found.values() for m in own) == sorted(keys(config))
    for group, own in found.items():
        assert all(metric.split("/")[0] == group for metric in own)
    assert {"eval", "reward", "policy", "critic", "guard", "timing_s", "samples"} <= found.keys()


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "new" / "spec.json"
    path.write_text(yaml.safe_dump(raw_config(tmp_path / "run")))
    assert main(["dashboard", str(path), "--out", str(out)]) == 0
    assert sections(json.loads(out.read_text()))
    assert capsys.readouterr().out == f"wrote {out}\n"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["dashboard", str(path), "--entity", "me"]) == 2
    assert "no W&B key" in capsys.readouterr().err
