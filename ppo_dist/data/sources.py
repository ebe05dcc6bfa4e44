"""Rows out of files, Hugging Face datasets and reasoning-gym tasks; a bad row is an error that says
where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ppo_dist.config.base import InputError, Origin
from ppo_dist.config.data import AnySource, GymSource
from ppo_dist.data.readers import rows_of
from ppo_dist.types import Checker


@dataclass(frozen=True)
class Row:
    """A row that has what its use demands. `prompt` is a text or a list of chat messages.

    Example: Row(uid="labelled/0:3", where="labels.jsonl, line 4", prompt="hello>",
    response="olleh", answer="olleh", checker=None)
    """

    uid: str
    where: str
    prompt: str | list[dict[str, str]]
    response: str | None
    answer: str | None
    checker: Checker | None


def read(sources: Sequence[AnySource], name: str, origin: Origin, needs_answer: bool) -> list[Row]:
    """All rows of the sources listed under `data.<name>`, checked for that use.

    Rows of origin `labelled` must have a response. With `needs_answer` they must have an answer
    too, for which the response stands in. Unlabelled rows lose answer, response and checker here,
    and nothing after this sees them.

    Raises:
        InputError: a file is missing or a row is wrong; names file, row and reason.
    """
    rows = []
    for number, source in enumerate(sources):
        found = False
        last = None if source.limit is None else source.offset + source.limit
        taken = islice(enumerate(rows_of(source)), source.offset, last)
        for position, (where, fields, checker) in taken:
            rows.append(
                _row(
                    f"{name}/{number}:{position}",
                    where,
                    fields,
                    checker,
                    source,
                    origin,
                    needs_answer,
                )
            )
            found = True
        if not found:
            raise InputError(f"data.{name}: {_title(source)} has no rows")
    return rows


def _row(
    uid: str,
    where: str,
    fields: Mapping[str, Any],
    checker: Checker | None,
    source: AnySource,
    origin: Origin,
    needs_answer: bool,
) -> Row:
    prompt_column, response_column, answer_column = _names(source)
    prompt = _prompt(source, prompt_column, where, fields)
    if origin == "unlabelled":
        return Row(uid, where, prompt, None, None, None)
    response = _shaped(source.response_template, fields, where, fields.get(response_column))
    answer = _answer(fields.get(answer_column), answer_column, where, needs_answer)
    if origin == "labelled":
        if not isinstance(response, str) or not response:
            raise InputError(
                f"{where}: {response_column!r} must be a text with something in it{_has(fields)}"
            )
        answer = response if answer is None else answer
    if needs_answer and checker is None and answer is None:
        raise InputError(
            f"{where}: {answer_column!r} is missing, the reward compares with it{_has(fields)}"
        )
    for text in (response if origin == "labelled" else None, answer):
        _check_text(text, where)
    return Row(uid, where, prompt, response if origin == "labelled" else None, answer, checker)


def _check_text(value: Any, where: str) -> None:
    """Refuses half of a surrogate pair, as JSON may spell it: no tokenizer and no file takes it."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half of a character (a lone surrogate)") from None


def _answer(value: Any, column: str, where: str, needed: bool) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if (is_number and is_finite) or isinstance(value, str):
        return str(value)
    if needed and value is not None:
        raise InputError(
            f"{where}: {column!r} must be a text or a finite number, the reward compares with it"
        )
    return None


def _names(source: AnySource) -> tuple[str, str, str]:
    if isinstance(source, GymSource):
        return "question", "answer", "answer"
    return source.columns.prompt, source.columns.response, source.columns.answer


def _has(fields: Mapping[str, Any]) -> str:
    return f" (the row has: {', '.join(map(str, fields)) or 'nothing'})"


def _prompt(
    source: AnySource, column: str, where: str, fields: Mapping[str, Any]
) -> str | list[dict[str, str]]:
    prompt = _shaped(source.prompt_template, fields, where, fields.get(column))
    if isinstance(prompt, str) and prompt:
        _check_text(prompt, where)
        return prompt
    if prompt is None or prompt == "":
        raise InputError(f"{where}: {column!r} is missing or empty{_has(fields)}")
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        for message in prompt:
            for text in message.values():
                _check_text(text, where)
        return prompt
    raise InputError(
        f"{where}: {column!r} must be a text or a list of messages with `role` and `content`"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(k), str) for k in ("role", "content")
    )


def _shaped(template: str | None, fields: Mapping[str, Any], where: str, otherwise: Any) -> Any:
    if template is None:
        return otherwise
    try:
        return template.format_map(fields)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}: the template does not fit the row: {error}{_has(fields)}"
        ) from None


def _title(source: AnySource) -> str:
    return source.task if isinstance(source, GymSource) else source.path
