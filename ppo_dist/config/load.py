"""Reads a config: YAML, then `key.sub=value` overrides, then the schema; every fault is one line
that names the key.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ppo_dist.config import Config
from ppo_dist.config.base import InputError, Section
from ppo_dist.config.redact import redacted_in
from ppo_dist.config.study import Study

S = TypeVar("S", bound=Section)
MOST_VALUES = 100_000
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The validated config of a YAML file.

    Its key `base` names another file, relative to it, from which it differs. Relative paths of data
    and models are as they stand, from the working directory.

    Raises:
        InputError: the file is missing or not YAML, or a key or value is wrong; names both.
    """
    raw = read(Path(path))
    for override in overrides:
        _override(raw, override)
    return validated(Config, raw, path)


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """The validated study of a YAML file. Raises as `load` does."""
    raw = read(Path(path))
    for override in overrides:
        _override(raw, override)
    return validated(Study, raw, path)


def validated(schema: type[S], raw: dict[str, Any], name: str | os.PathLike[str]) -> S:
    """The config that a mapping describes.

    Raises:
        InputError: a key or value is wrong; names both, and `name`.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail, schema) for detail in error.errors()]
        raise InputError(f"{name}: " + "; ".join(dict.fromkeys(lines))) from None


def dump(config: Config) -> str:
    """The resolved config as YAML: every key, defaults included; `load` reads it back to an equal
    config, but for credentials in its values: these are left out.
    """
    plain = redacted_in(config.model_dump(mode="json"))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def read(
    path: Path, changes: dict[str, Any] | None = None, below: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The mapping of a YAML file, on top of that of its `base`; `changes` are made in the lowest.

    Raises:
        InputError: a file is missing or not YAML, or bases go round in a circle.
    """
    raw = read_yaml(path)
    if path.resolve() in below:
        raise InputError(f"{path}: is its own base")
    base = raw.pop("base", None)
    if base is None:
        return merged(raw, changes or {})
    if not isinstance(base, str):
        raise InputError(f"{path}: base must be the path of another config")
    return merged(read(path.parent / base, changes, (*below, path.resolve())), raw)


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `top`, section by section; a part of another kind, or with the
    questions of another task, replaces the whole section.
    """
    made = dict(base)
    for key, value in top.items():
        below = base.get(key)
        if isinstance(below, str) and below.isidentifier():  # a bare kind; files have a suffix
            below = {"kind": below}
        made[key] = value
        if isinstance(below, dict) and isinstance(value, dict):
            names = ("kind", "task")
            if all(value.get(name, below.get(name)) == below.get(name) for name in names):
                made[key] = merged(below, value)
    return made


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, alone. Raises InputError as `read` does."""
    try:
        raw = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a config is a mapping of sections, such as `run:` and `train:`")
    return raw


def _parsed(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: it is none, or grows beyond measure once its aliases are written out.
    """
    try:
        value = yaml.safe_load(text)
        if _size(value, {}) > MOST_VALUES:
            raise ValueError(f"its aliases make more than {MOST_VALUES} values")
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from None  # PyYAML itself fails on some tags and dates
    except RecursionError:
        raise ValueError("it is nested too deeply, or an alias stands inside itself") from None
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are with every alias written out, each of them counted once."""
    if isinstance(value, str):
        value.encode()  # no file takes half of a surrogate pair
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"{override!r}: an override is written key.sub=value")
    try:
        value = _parsed(text)
    except ValueError:
        raise InputError(f"{override!r}: the value is not valid YAML") from None
    node = raw
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = {}
        elif isinstance(child, str):
            child = {"kind": child}
        elif not isinstance(child, dict):
            raise InputError(f"{override!r}: {part} is not a section, give it as a whole")
        node[part] = child
        node = child
    node[parts[-1]] = value


def _explain(detail: ErrorDetails, schema: type[Section]) -> str:
    """One clear line for one fault that pydantic found."""
    path, section = _walk(detail["loc"], schema)
    key = ".".join(path) or "config"
    match detail["type"]:
        case "extra_forbidden":
            known = list(section.model_fields) if section else []
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
            prefix = ".".join(path[:-1])
            hint = (
                f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
                if near
                else f"allowed: {', '.join(known)}"
            )
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: required"
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            return (
                f"{key}: kind {context.get('tag')!r} is not one of {context.get('expected_tags')}"
            )
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{key}: {message}" if path else message
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{key}: {message} (got {SHORT.repr(detail['input'])})"


def _walk(
    loc: Iterable[int | str], schema: type[Section]
) -> tuple[list[str], type[Section] | None]:
    """The keys of a fault as the user wrote them, and the section that holds the last one.

    pydantic puts the kind of a part into the path as if it were a key; those are left out.
    """
    path: list[str] = []
    section: type[Section] | None = schema
    candidates: list[type[Section]] = [schema]
    for part in loc:
        tagged = [c for c in candidates if part in _kinds(c)]
        if len(candidates) > 1 and tagged:
            candidates = tagged
            continue
        if isinstance(part, int):
            path.append(str(part))
            continue
        if not candidates:  # below a plain value stand names of types, which no user wrote
            continue
        path.append(str(part))
        section = candidates[0] if candidates else None
        field = section.model_fields.get(part) if section else None
        candidates = list(_sections(field.annotation)) if field else []
    return path, section


def _kinds(section: type[Section]) -> tuple[Any, ...]:
    field = section.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections(inner)
