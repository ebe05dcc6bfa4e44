"""What counts as a credential, and what does not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml

from ppo_dist.config.load import dump, load
from ppo_dist.config.redact import Redacting, redacted, redacted_in
from ppo_dist.tracking.local import record_event
from tests.conftest import raw_config

HIDDEN = [
    ("get https://ann:pa55w0rd@host:80/x?y=1", "get https://***@host:80/x?y=1"),
    ("https://ghx0token@host", "https://***@host"),
    ("redis://:p@ss@word@10.0.0.1/0", "redis://***@10.0.0.1/0"),
    ("https://host/x?api_key=abc&n=1", "https://host/x?api_key=***&n=1"),
    ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer ***"),
    ("hf_" + "a1B2c3D4e5" * 3, "***"),
    ("it is sk-" + "x" * 24 + ".", "it is ***."),
]
SHOWN = [
    "https://host/path@2x.png",
    "ann@host.org",
    "the bearer of this letter",
    "basic arithmetic",
    "hf_model_of_a_long_name",
    "risk-averse-investors-of-the-world",
    "data.max_prompt_tokens is 12",
    "step 3/10  KL 0.001",
]


@pytest.mark.parametrize(("text", "left"), HIDDEN)
def test_what_looks_like_a_credential(text: str, left: str) -> None:
    assert redacted(text) == left == redacted(left)


@pytest.mark.parametrize("text", SHOWN)
def test_what_does_not(text: str) -> None:
    assert redacted(text) == text


def test_variables_that_are_named_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert redacted(f"a value-of-{name}, b") == "a ***, b"
    monkeypatch.setenv("DB_PASSWORD", "correct horse")
    monkeypatch.setenv("MY_TOKEN", "correct horse battery")
    assert redacted("correct horse battery, correct horse") == "***, ***", "the longest first"
    for name, value in (("USE_TOKEN", "true"), ("TOKENIZERS_PARALLELISM", "false-false")):
        monkeypatch.setenv(name, value)
        assert redacted(f"it is {value}") == f"it is {value}"


def test_plain_data() -> None:
    given = {"api_key": "x", "n": [1, None, {"url": "http://a:b@c"}], "tokens": "all", "token": ""}
    left = {"api_key": "***", "n": [1, None, {"url": "http://***@c"}], "tokens": "all", "token": ""}
    assert redacted_in(given) == left
    assert given["api_key"] == "x", "what it was given is as it was"


def test_a_stream() -> None:
    under = io.StringIO()
    stream = Redacting(under)
    print("see http://a:b@c", 7, file=stream)  # type: ignore[call-overload]
    assert under.getvalue() == "see http://***@c 7\n" and not stream.isatty()


def test_the_resolved_config_and_the_events_have_none(tmp_path: Path) -> None:
    held_out = {"kind": "huggingface", "path": "https://u:secret99@h/set"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path / "run", data={"held_out": held_out})))
    config = load(path)
    assert config.data.held_out[0].path == "https://u:secret99@h/set"  # type: ignore[union-attr]
    assert "secret99" not in dump(config) and "https://***@h/set" in dump(config)
    record_event(tmp_path, "failed", reason="GET http://u:secret99@h: 401", more=["token=1"])
    assert "secret99" not in (tmp_path / "events.jsonl").read_text()
