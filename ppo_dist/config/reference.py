"""The config's reference as Markdown, out of the schema: `python -m ppo_dist.config.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from ppo_dist.config import Config
from ppo_dist.config.study import Study

Schema = dict[str, Any]
HEAD = """# Config reference

Every key of a run's config, what is allowed, and its default. On the command line `key=value` after
the config's name overrides one: `ppo-dist train mine.yaml learner.lr=2e-6`. What has a `kind` may
be given as the bare kind where its other keys have defaults (`optimizer: sgd`; not `transport` and
`cluster`), a schedule as a bare number, and a file of data as its bare path.

`base: other.yaml`, relative to the file that says so, begins with another config: only what differs
is written. A part of another kind replaces the other's whole section.

Made by `python -m ppo_dist.config.reference`; a test compares.
"""
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}


def reference() -> str:
    """All sections, and then what may stand where a `kind` is chosen."""
    schema, study = Config.model_json_schema(), Study.model_json_schema()
    definitions, chosen = study["$defs"] | schema["$defs"], dict[str, Schema]()
    parts = [HEAD]
    for name, key in schema["properties"].items():
        section = _resolved(key.get("anyOf", [key])[0], definitions)  # the second one is null
        words = section.get("description", "") or key.get("description", "")
        parts.append(_table(f"## {name}", words, _rows(section, definitions, "", chosen)))
    parts.append(_table("## A study", study["description"], _rows(study, definitions, "", chosen)))
    parts.append("## Kinds\n")
    done: set[str] = set()
    while left := sorted(chosen.keys() - done):
        for title in left:
            done.add(title)
            kind = chosen[title]["properties"].get("kind", {}).get("const")
            head = f"### {title}\n\n`kind: {kind}`" if kind else f"### {title}"
            rows = _rows(chosen[title], definitions, "", chosen)
            words = " ".join(chosen[title].get("description", "").split())
            parts.append(_table(head, words, rows))
    return "\n".join(parts).rstrip() + "\n"


def _table(title: str, words: str, rows: Iterator[str]) -> str:
    lines = [title, "", *([" ".join(words.split()), ""] if words else [])]
    made = list(rows)
    if made:
        lines += ["| key | allowed | default | meaning |", "|---|---|---|---|", *made, ""]
    return "\n".join(lines)


def _rows(section: Schema, definitions: Schema, prefix: str, chosen: Schema) -> Iterator[str]:
    for name, key in section.get("properties", {}).items():
        if name == "kind" and "const" in key:
            continue
        inner = _resolved(key, definitions)
        if "properties" in inner and "oneOf" not in key and "anyOf" not in key:
            given = key.get("default", {})  # the section that holds it has its say
            own = {
                n: {**k, "default": given[n]} if n in given else k
                for n, k in inner["properties"].items()
            }
            yield from _rows({"properties": own}, definitions, f"{prefix}{name}.", chosen)
            continue
        default = f"`{_value(key['default'])}`" if "default" in key else "*none: must be given*"
        words = " ".join(key.get("description", inner.get("description", "")).split())
        allowed = " or ".join(dict.fromkeys(_allowed(key, definitions, chosen)))
        yield f"| `{prefix}{name}` | {allowed} | {default} | {words.replace('|', chr(92) + '|')} |"


def _allowed(key: Schema, definitions: Schema, chosen: Schema) -> Iterator[str]:
    for option in key.get("anyOf", []) + key.get("oneOf", []):
        yield from _allowed(option, definitions, chosen)
    inner = _resolved(key, definitions)
    if "kind" in inner.get("properties", {}):
        chosen[inner["title"]] = inner
        kind = inner["properties"]["kind"].get("const", inner["title"])
        yield f"[`{kind}`](#{inner['title'].lower()})"
    elif "properties" in inner:
        chosen[inner["title"]] = inner
        yield f"[{inner['title']}](#{inner['title'].lower()})"
    elif "enum" in inner or "const" in inner:
        yield ", ".join(f"`{value}`" for value in inner.get("enum", [inner.get("const")]))
    elif inner.get("type") == "array":
        items = inner.get("prefixItems") or [inner.get("items", {})]
        each = [" or ".join(_allowed(item, definitions, chosen)) for item in items]
        yield f"list of {', '.join(each)}"
    elif "patternProperties" in inner:
        (values,) = inner["patternProperties"].values()
        yield f"mapping of names to {' or '.join(_allowed(values, definitions, chosen))}"
    elif "type" in inner:
        bounds = [words.format(inner[bound]) for bound, words in BOUNDS.items() if bound in inner]
        yield " ".join([inner["type"].replace("object", "mapping"), ", ".join(bounds)]).strip()


def _resolved(key: Schema, definitions: Schema) -> Schema:
    if "$ref" in key:
        found: Schema = definitions[key["$ref"].rpartition("/")[2]]
        return found
    return key


def _value(value: Any) -> str:
    if isinstance(value, dict):
        if set(value) >= {"kind", "value"} and value["kind"] == "constant":
            return _value(value["value"])
        inner = ", ".join(f"{name}: {_value(item)}" for name, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


if __name__ == "__main__":
    sys.stdout.write(reference())
