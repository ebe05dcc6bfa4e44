"""docs/config.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from ppo_dist.config import Config
from ppo_dist.config.reference import reference

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
