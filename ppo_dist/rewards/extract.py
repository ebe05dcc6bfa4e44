"""Answers out of responses. None means that there is none."""

from __future__ import annotations

import re
from collections.abc import Callable

from ppo_dist.config.reward import Extract

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def extractor(extract: Extract) -> Callable[[str], str | None]:
    """The function that a config names."""
    match extract.kind:
        case "text":
            return whole_text
        case "first_line":
            return first_line
        case "last_number":
            return last_number
        case "after":
            return lambda text: after(text, extract.marker)


def whole_text(text: str) -> str | None:
    """The response without white space at its ends."""
    return text.strip() or None


def first_line(text: str) -> str | None:
    """The first line that has something in it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def last_number(text: str) -> str | None:
    """The last number, without thousands separators."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def after(text: str, marker: str) -> str | None:
    """What stands on the same line after the last occurrence of the marker."""
    _, found, rest = text.rpartition(marker)
    return rest.partition("\n")[0].strip() or None if found else None
