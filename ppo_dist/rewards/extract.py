"""Answers out of responses. None means that there is none."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ppo_dist.config.reward import AnyExtract, ExtractAfter, FunctionOf
from ppo_dist.rewards.user import load_function

LATEX = re.compile(r"[\\^_{}()\[\]=<>]")
MARKED = re.compile(r"\$|\\boxed")
PROSE = re.compile(r"[^\W\d_]{3}")  # a word
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
PATIENCE_S = 5
T = TypeVar("T")


def extractor(extract: AnyExtract) -> Callable[[str], str | None]:
    """The function that a config names.

    Raises:
        InputError: it is the user's own and cannot be loaded.
    """
    if isinstance(extract, ExtractAfter):
        return lambda text: after(text, extract.marker)
    if isinstance(extract, FunctionOf):
        return load_function(extract.path, extract.name)
    match extract.kind:
        case "text":
            return whole_text
        case "first_line":
            return first_line
        case "last_number":
            return last_number
        case "boxed":
            return boxed


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


def boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, in math-verify's own spelling, so that \\frac12, 1/2 and 0.5
    agree.
    """
    if "\\boxed" not in text:
        return None
    from math_verify import LatexExtractionConfig, parse

    only_boxed = LatexExtractionConfig(boxed_match_priority=0)
    last = text[text.rindex("\\boxed") :]
    found = parse(last, [only_boxed], parsing_timeout=_patience_s())
    return str(found[0]) if found else None


def is_same_mathematics(text: str, answer: str) -> bool:
    """Whether the answer in a text equals another one, by math-verify, which reads LaTeX only where
    it is marked as such.

    Raises:
        ValueError: the other one is no mathematics.
    """
    from math_verify import parse, verify

    limit = _patience_s()
    # of prose math-verify takes the last number
    is_prose = PROSE.search(answer) and not LATEX.search(answer)
    gold = parse(answer, parsing_timeout=limit) if is_prose else []
    if not gold:
        marked = answer if MARKED.search(answer) else f"\\boxed{{{answer}}}"
        gold = parse(marked, parsing_timeout=limit)
    if not gold:
        raise ValueError(f"math-verify cannot read the answer {answer!r}")
    return bool(verify(gold, parse(text, parsing_timeout=limit), timeout_seconds=limit))


def in_time(work: Callable[[], T]) -> T:
    """What the work gives.

    Raises:
        TimeoutError: it takes too long. Only in the main thread, which alone can be interrupted.
    """
    limit_s = _patience_s()
    if limit_s is None:
        return work()

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {limit_s} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _patience_s() -> int | None:
    """math-verify, too, stops a hopeless expression by a signal, for the main thread alone."""
    return PATIENCE_S if threading.current_thread() is threading.main_thread() else None
