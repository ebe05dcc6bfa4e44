"""docs/config.md is what the schema says, docs/metrics.md what rows have."""

from __future__ import annotations

import re
from pathlib import Path

from ppo_dist.config import Config
from ppo_dist.config.reference import reference
from ppo_dist.tracking import dashboard
from ppo_dist.tracking.metrics import keys
from ppo_dist.tracking.reference import MEANINGS, SECTIONS
from ppo_dist.tracking.reference import reference as metrics
from tests.conftest import raw_config

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_of_this_schema() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m ppo_dist.config.reference > docs/config.md"


def test_it_has_every_key_and_every_kind() -> None:
    schema, page = Config.model_json_schema(), reference()
    for definition in schema["$defs"].values():
        for name, key in definition["properties"].items():
            if name == "kind" and "const" in key:
                assert f"`kind: {key['const']}`" in page
            else:
                assert f"`{name}`" in page or f".{name}`" in page or f"`{name}." in page, name


def test_a_default_is_that_of_the_section_which_holds_it() -> None:
    """Shares are 0, but Mix has one of 1."""
    rows = {
        line.split("|")[1].strip(): line.split("|")
        for line in reference().splitlines()
        if "|" in line
    }
    assert rows["`shares.verifiable`"][3].strip() == "`1`"
    assert rows["`shares.labelled`"][3].strip() == "`0`"
    assert rows["`options`"][3].strip() == "`{}`" and "must" in rows["`task`"][3]


def test_the_page_of_metrics_is_of_these_rows(tmp_path: Path) -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert page == metrics(), "python -m ppo_dist.tracking.reference > docs/metrics.md"
    assert SECTIONS.keys() == dashboard.SECTIONS.keys()
    assert all(f"| `{key}` | " in page for key in MEANINGS)


def test_every_metric_of_a_run_with_everything_has_a_meaning_and_no_other(tmp_path: Path) -> None:
    words = raw_config(tmp_path)["data"]["labelled"]
    model = {"kind": "model", "path": "some/reward-model"}
    raw = raw_config(
        tmp_path,
        data={"unlabelled": {**words, "seed": 5}, "test": {**words, "seed": 6}},
        reward={"unlabelled": {"kind": "vote", "extract": "last_number"}, "verifiable": model},
        algorithm={
            "reward": {"normalise": True, "clip": 5.0},
            "kl": {"kind": "loss", "coef": 0.1},
        },
        mix={"shares": {"labelled": 1, "verifiable": 1, "unlabelled": 1}},
        semi={"pseudo": {"batch": 2}, "probe": 0.3},
        rollout={"group_size": 3},
        stream={"max_lag": 1},
    )
    named = set()
    for key in keys(Config.model_validate(raw)):
        for pattern, word in (
            (r"(?<=/)(labelled|verifiable|unlabelled)\b", "ORIGIN"),
            (r"(?<=^eval/)(held_out|test)", "SET"),
            (r"(?<=^system/)(rollout|learner|reward)-\d+", "WORKER"),
        ):
            key = re.sub(pattern, word, key)
        named.add(key)
    assert named == MEANINGS.keys()
