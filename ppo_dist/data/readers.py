"""One reader for each kind of source: files, Hugging Face datasets, reasoning-gym tasks. Rows come
as they are, with where they stand.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ppo_dist.config.base import InputError
from ppo_dist.config.data import AnySource, FileSource, GymSource, HubSource
from ppo_dist.types import Checker

REFUSED = {
    *(".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar"),
    *(".pkl", ".pickle", ".py", ".eval"),
}
HELD_OUT_SHARE = 0.2
"""Part of all questions of a reasoning-gym task that belong to its held-out split."""
Fields = tuple[str, Mapping[str, Any], Checker | None]


def rows_of(source: AnySource) -> Iterator[Fields]:
    """(where, row, checker) of every row.

    Raises:
        InputError: the source is missing or is none; names it.
    """
    match source:
        case FileSource():
            return _file(Path(source.path))
        case HubSource():
            return _hub(source)
        case GymSource():
            return islice(_gym(source), source.size)


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
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # of the many that damaged bytes lead to
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable Parquet file: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row, None


def _hub(source: HubSource) -> Iterator[Fields]:
    import datasets

    _check_folder(Path(source.path))
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


def _check_folder(folder: Path) -> None:
    """Refuses what a data folder may hold beside data, and lists of files that lead out of it."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in REFUSED:
            raise InputError(f"{folder}: {name} is an archive or code, and is not opened")
    for state in folder.rglob("state.json"):
        try:
            listed = [
                str(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]
            ]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise InputError(f"{state}: is not of a saved dataset: {error}") from None
        for name in listed:
            if Path(name).name != name:
                raise InputError(f"{state}: {name} is not inside the folder")


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
        # as it is: verifiers compare with its tuples, which JSON would make lists
        checker = Checker(source.task, source.options, copy.deepcopy(entry))
        yield f"{where}, item {i}", fields, checker
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
