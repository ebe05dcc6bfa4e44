"""Credentials out of whatever is written or shown: a run folder is shared, a terminal is pasted."""

from __future__ import annotations

import os
import re
from typing import Any, TextIO

REDACTED = "***"
SHORTEST = 8  # shorter values of variables that are named like secrets are flags, not secrets
NAME = re.compile(
    r"(?:^|[_-])(?:token|api_?key|key|secret|password|passwd|credentials?|authorization)$", re.I
)
PATTERNS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#]+@", re.I), rf"\1{REDACTED}@"),
    (
        re.compile(r"([?&][\w-]*(?:token|key|secret|password|signature|sig)=)[^&\s#'\"]+", re.I),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b(bearer\s+)[\w.~+/=-]{20,}", re.I), rf"\1{REDACTED}"),
    # what Hugging Face, GitHub, OpenAI and AWS begin their keys with
    (re.compile(r"\b(?:hf_|gh[opsu]_|sk-|AKIA)[A-Za-z0-9-]{16,}|github_pat_\w{16,}"), REDACTED),
)


def redacted(text: str) -> str:
    """The text without what looks like a credential, and without the values of environment
    variables that are named like one (WANDB_API_KEY, HF_TOKEN, RAY_AUTH_TOKEN, …).
    """
    for secret in _of_the_environment():
        text = text.replace(secret, REDACTED)
    for pattern, rest in PATTERNS:
        text = pattern.sub(rest, text)
    return text


def redacted_in(value: Any) -> Any:
    """The same of every text in plain data; under a key that is named like a credential nothing is
    left.
    """
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {
            redacted_in(key): REDACTED
            if isinstance(key, str) and NAME.search(key) and isinstance(inner, str) and inner
            else redacted_in(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted_in(inner) for inner in value]
    return value


class Redacting:
    """A text stream that lets no credential through; in all else the stream that it stands for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See TextIO."""
        return self._stream.write(redacted(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _of_the_environment() -> list[str]:
    found = {v for name, v in os.environ.items() if NAME.search(name) and len(v) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
