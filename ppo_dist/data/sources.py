"""Rows out of files, Hugging Face datasets and reasoning-gym tasks; a bad row is an error that says
where it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ppo_dist.config.base import InputError, Origin
from ppo_dist.config.data import AnySource, FileSource, GymSource, HubSource
from ppo_dist.types import Checker

HELD_OUT_SHARE = 0.2
"""Part of all questions of a reasoning-gym task that belong to its held-out split."""


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
        taken = islice(enumerate(_fields(source)), source.offset, last)
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
    return Row(uid, where, prompt, response if origin == "labelled" else None, answer, checker)


def _answer(value: Any, column: str, where: str, needed: bool) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number or isinstance(value, str):
        return str(value)
    if needed and value is not None:
        raise InputError(
            f"{where}: {column!r} must be a text or a number, the reward compares with it"
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
        return prompt
    if prompt is None or prompt == "":
        raise InputError(f"{where}: {column!r} is missing or empty{_has(fields)}")
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
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


# ── one reader per kind of source: (where, fields, checker) ───────────────────────────────────────

Fields = tuple[str, Mapping[str, Any], Checker | None]


def _fields(source: AnySource) -> Iterator[Fields]:
    match source:
        case FileSource():
            return _file(Path(source.path))
        case HubSource():
            return _hub(source)
        case GymSource():
            return islice(_gym(source), source.size)


def _title(source: AnySource) -> str:
    return source.task if isinstance(source, GymSource) else source.path


def _file(path: Path) -> Iterator[Fields]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    match path.suffix:
        case ".jsonl":
            yield from _jsonl(path)
        case ".json":
            yield from _json(path)
        case ".parquet":
            yield from _parquet(path)
        case suffix:
            raise InputError(
                f"{path}: cannot read {suffix or 'a file without an ending'}; "
                ".jsonl, .json and .parquet are allowed"
            )


def _jsonl(path: Path) -> Iterator[Fields]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, _object(line, where), None


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f'{where}: a row must be an object, such as {{"prompt": "…"}}')
    return value


def _json(path: Path) -> Iterator[Fields]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: must hold one list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row, None


def _parquet(path: Path) -> Iterator[Fields]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row, None


def _hub(source: HubSource) -> Iterator[Fields]:
    import datasets

    try:
        if Path(source.path).is_dir() and (Path(source.path) / "state.json").exists():
            dataset = datasets.load_from_disk(source.path)
        elif Path(source.path).is_dir() and (Path(source.path) / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(source.path)[source.split]
        else:
            dataset = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # whatever a dataset's loader raises, the user must mend the source
        raise InputError(
            f"{source.path}: cannot be loaded as a Hugging Face dataset: "
            f"{' '.join(str(error).split())}"
        ) from None
    for number, row in enumerate(dataset, start=1):
        yield f"{source.path}, row {number}", row, None


def _gym(source: GymSource) -> Iterator[Fields]:
    """Distinct questions of the asked split, in an order that the seed decides."""
    import reasoning_gym

    where = f"reasoning_gym {source.task}"
    tries = 50 * source.size + 1000
    try:
        # item i of a task is made from seed + i, so near seeds would share nearly all items
        dataset = reasoning_gym.create_dataset(
            source.task, seed=source.seed * 1_000_003, size=tries, **source.options
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"{where}: {error}") from None
    seen: set[str] = set()
    for i in range(tries):
        entry = dataset[i]
        question = str(entry["question"])
        if question in seen or (held_out_part(question) != (source.split == "held_out")):
            continue
        seen.add(question)
        fields = {**entry["metadata"], "question": question, "answer": entry["answer"]}
        plain = json.loads(json.dumps(entry, default=str))
        yield f"{where}, item {i}", fields, Checker(source.task, source.options, plain)
        if len(seen) == source.size:
            return
    raise InputError(
        f"{where}: has only {len(seen)} different {source.split} questions with these options, "
        f"{source.size} were asked for"
    )


def held_out_part(question: str) -> bool:
    """Whether a question belongs to the held-out split: decided by its own text, white space and
    case aside.
    """
    digest = hashlib.sha256(" ".join(question.lower().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE
