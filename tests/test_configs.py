"""Shipped configs load; every key of the schema is read by somebody."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_dist.config import Config, Section
from ppo_dist.config.load import dump, load, load_study
from ppo_dist.study.cells import cells

ROOT = Path(__file__).parent.parent


SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
STUDIES = [path for path in SHIPPED if "methods" in yaml.safe_load(path.read_text())]
CONFIGS = [path for path in SHIPPED if path not in STUDIES]


@pytest.mark.parametrize(("name", "visits"), [("study.yaml", 6), ("smollm2.yaml", 2)])
def test_the_studies_have_cells(name: str, visits: float) -> None:
    """All make as many updates, and every unlabelled prompt comes often enough."""
    path = ROOT / "configs" / "study" / name
    made = cells(load_study(path), path)
    assert len({cell.path for cell in made}) == len(made)
    assert all(cell.visits >= visits for cell in made if cell.config["data"]["unlabelled"])
    assert len({cell.config["train"]["steps"] for cell in made}) == 1, "equal updates"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_load(path: Path, tmp_path: Path) -> None:
    config = load(path)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


def sections(annotation: Any, seen: set[type[Section]]) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section) and annotation not in seen:
        seen.add(annotation)
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation, seen)
    for inner in typing.get_args(annotation):
        yield from sections(inner, seen)


def test_no_key_is_dead() -> None:
    """Every field is read as an attribute outside the schema (origins also as
    `dict(section)[origin]`).
    """
    outside = [p for p in (ROOT / "ppo_dist").rglob("*.py") if p.parent.name != "config"]
    code = "\n".join(p.read_text() for p in outside)
    fields = {f"{s.__name__}.{name}" for s in sections(Config, set()) for name in s.model_fields}
    by_origin = {
        f"{s}.{o}"
        for s in ("Data", "Reward", "Shares")
        for o in ("labelled", "verifiable", "unlabelled")
    }
    # a kind chooses the section: the schema itself is its reader
    known = by_origin | {f for f in fields if f.endswith(".kind")}
    dead = [f for f in sorted(fields - known) if not re.search(rf"\.{f.split('.')[1]}\b", code)]
    assert not dead
