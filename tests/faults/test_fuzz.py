"""Whatever is fed to the readers, it works or is one clear error: nothing crashes, hangs, runs code
or writes anywhere but where it was told to.

The cases follow from the code of this file alone. A few of each kind are in the fast suite, 10,000
in the slow one.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import strategies as st

from ppo_dist import files
from ppo_dist.config import Config, InputError
from ppo_dist.config.data import Data, FileSource
from ppo_dist.config.load import dump, load
from ppo_dist.config.reward import Extract, ExtractAfter, GymReward, NumericReward
from ppo_dist.coordinator.state import Checkpoints, read_state
from ppo_dist.data.encode import Encoder
from ppo_dist.data.sources import read
from ppo_dist.learner import shards
from ppo_dist.learner.shards import Piece
from ppo_dist.models.scratch import _character_tokenizer
from ppo_dist.recovery import Start
from ppo_dist.rewards.extract import extractor
from ppo_dist.rewards.gym import gym
from ppo_dist.rewards.remote import NoAnswer, _numbers
from ppo_dist.rewards.rules import Judged, mathematics, numeric
from tests.conftest import raw_config
from tests.faults.fuzz import fuzz, only_in, refused, sizes, violations, watched
from tests.unit.rig import Rig
from tests.unit.test_gym import entry_of
from tests.unit.test_gym import rollout as asked
from tests.unit.test_rewards import rollout

# ── configs ───────────────────────────────────────────────────────────────────────────────────────

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "off", "null", "1e-3", "x" * 300, "a\0b", "..", "/", "~", "adaptive"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.just("kind"), inner, max_size=3)
    ),
    max_leaves=8,
)
FILE = {"kind": "file", "path": "x.jsonl"}
PLAIN = raw_config(Path("run"), data={"verifiable": FILE})
RICH = raw_config(
    Path("run"),
    model={"lora": {"rank": 4}},
    reference={"reset": "never"},
    data={"labelled": FILE, "verifiable": FILE, "unlabelled": FILE, "held_out": FILE, "test": FILE},
    reward={
        "labelled": {"kind": "function", "path": "mine.py", "name": "score"},
        "verifiable": {
            "kind": "weighted",
            "parts": [
                {"weight": 1, "reward": {"kind": "remote", "url": "https://judge.example/score"}},
                {"weight": 2, "reward": {"kind": "model", "path": "judge"}},
                {"weight": 3, "reward": {"kind": "regex", "pattern": "a+"}},
            ],
        },
        "unlabelled": {"kind": "vote", "extract": {"kind": "after", "marker": "A:"}},
    },
    mix={
        "schedule": {"kind": "supervised_first", "steps": 3, "then": 0.5},
        "shares": {
            "labelled": 1,
            "verifiable": {"kind": "linear", "start": 0, "end": 1, "steps": 4},
            "unlabelled": 1,
        },
    },
    semi={
        "gate": {"kind": "trajectory", "window": 2},
        "pseudo": {"batch": 2},
        "guard": {"drop": {"limit": 0.1, "action": "roll_back"}},
        "probe": 0.2,
    },
    rollout={"group_size": 3, "engine": {"kind": "vllm"}},
    stream={"max_lag": 1},
    eval={"every": 2},
)
del RICH["model"]["scratch"]
RICH["model"]["path"] = "m"


def _whole(raw: dict[str, Any]) -> dict[str, Any]:
    """Every key of it, defaults included."""
    made: dict[str, Any] = yaml.safe_load(dump(Config.model_validate(raw)))
    return made


WHOLES = [_whole(PLAIN), _whole(RICH)]
WHOLE = WHOLES[0]


def _paths(node: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(node, dict):
        return [above]
    return [above, *(p for key, inner in node.items() for p in _paths(inner, (*above, key)))]


KEYS = [[path for path in _paths(whole) if path] for whole in WHOLES]


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A whole config of which some keys have other values, or other keys, or are gone."""
    number = draw(st.integers(0, len(WHOLES) - 1))
    raw = copy.deepcopy(WHOLES[number])
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(KEYS[number]))
        node: Any = raw
        for part in above:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if not isinstance(node, dict):
            continue
        match draw(st.integers(0, 3)):
            case 0:
                node.pop(key, None)
            case 1:
                node[draw(st.text(max_size=8) | st.integers())] = draw(VALUES)
            case _:
                node[key] = draw(VALUES)
    return yaml.safe_dump(raw, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")


YAML_TEXT = st.text(alphabet="abk:-[]{}&*!<>|?#'\"%@`,. \n\t0123~=", max_size=60)


@sizes(40, 2000)
def test_config_files(tmp_path: Path, count: int) -> None:
    path = tmp_path / "c.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            config = load(path)
        except InputError as error:
            return refused(error)
        (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
        assert dump(load(tmp_path / "again.yaml")) == dump(config)

    garbage = st.binary(max_size=60) | YAML_TEXT.map(lambda t: t.encode())
    with only_in(tmp_path):
        fuzz(count, check, configs() | configs() | garbage)


@sizes(30, 1500)
def test_overrides(tmp_path: Path, count: int) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    key = st.sampled_from([".".join(p) for p in KEYS[0]]) | st.text(max_size=12)
    value = YAML_TEXT | VALUES.map(lambda v: yaml.safe_dump(v, default_flow_style=True))

    def check(overrides: list[str]) -> None:
        try:
            load(path, overrides)
        except InputError as error:
            refused(error)

    one = st.tuples(key, value).map("=".join) | st.text(max_size=12)
    with only_in(tmp_path):
        fuzz(count, check, st.lists(one, min_size=1, max_size=3))


# ── data ──────────────────────────────────────────────────────────────────────────────────────────

ROWS = [{"prompt": f"{i}+1=", "response": str(i + 1), "answer": i + 1} for i in range(4)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "x"]), "content": JSON}), max_size=2
)
SURROGATES = st.sampled_from(["\ud83d", "a\udc00", "ok"])
FIELD = JSON | st.text() | MESSAGES | SURROGATES
ROW = st.dictionaries(st.sampled_from(["prompt", "response", "answer", "more"]), FIELD, max_size=4)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


SOUND = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS).encode(),
    ".parquet": parquet(ROWS),
}


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are others, are gone, or come twice; or nothing but garbage."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=80))
    spoilt = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(spoilt) - 1, 0)))
        match draw(st.integers(0, 3)):
            case 0:
                spoilt[at : at + 1] = draw(st.binary(min_size=1, max_size=3))
            case 1:
                del spoilt[at:]
            case 2:
                del spoilt[at : at + draw(st.integers(1, 40))]
            case _:
                spoilt[at:at] = spoilt[at : at + draw(st.integers(1, 40))]
    return bytes(spoilt)


def accepted(path: Path) -> None:
    """Reads a file for each use; what is taken can be turned into tokens."""
    tokenizer = _character_tokenizer(["0123456789+=ab"])
    for origin in ("labelled", "verifiable", "unlabelled"):
        for needs_answer in (False, True):
            try:
                rows = read([FileSource(path=str(path))], origin, origin, needs_answer)  # type: ignore[arg-type]
                Encoder(tokenizer, Data(max_prompt_tokens=64)).prompts(rows, origin)  # type: ignore[arg-type]
            except InputError as error:
                refused(error)


@pytest.mark.parametrize("kind", SOUND)
@sizes(15, 900)
def test_bytes_of_data_files(tmp_path: Path, kind: str, count: int) -> None:
    path = tmp_path / f"rows{kind}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        accepted(path)

    with only_in(tmp_path):
        fuzz(count, check, spoiled(SOUND[kind]))


@sizes(25, 1500)
def test_rows(tmp_path: Path, count: int) -> None:
    path = tmp_path / "rows.jsonl"

    def check(rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        accepted(path)

    with only_in(tmp_path):
        fuzz(count, check, st.lists(ROW, max_size=3))


@sizes(5, 300)
def test_parquet_rows(tmp_path: Path, count: int) -> None:
    path = tmp_path / "rows.parquet"
    value = st.text(max_size=8) | st.integers(-9, 9) | st.floats() | st.binary(max_size=4)
    column = st.lists(st.none() | value, min_size=1, max_size=3)

    def check(columns: dict[str, list[Any]]) -> None:
        length = max(map(len, columns.values()), default=0)
        filled = {k: (v * length)[:length] for k, v in columns.items()}
        try:
            pyarrow.parquet.write_table(pyarrow.table(filled), path)
        except (pyarrow.ArrowException, UnicodeEncodeError, ValueError):
            return  # no such table
        accepted(path)

    names = st.sampled_from(["prompt", "response", "answer"])
    with only_in(tmp_path):
        fuzz(count, check, st.dictionaries(names, column, max_size=3))


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a loop whose every part remembers something."""
    run = tmp_path_factory.mktemp("run")
    rig = Rig(run, stream={"max_lag": 1}, train={"steps": 3}, eval={"every": 1})
    rig.loop.run(lambda: rig.loop.state.step >= 2)
    (folder,) = (run / "checkpoints").iterdir()
    return folder


@st.composite
def harms(draw: st.DrawFn) -> tuple[str, int, int, Any]:
    kinds = ["flip", "cut", "grow", "delete", "link", "extra", "manifest", "state", "run", "none"]
    return (
        draw(st.sampled_from(kinds)),
        draw(st.integers(0, 99)),
        draw(st.integers(0, 10**6)),
        draw(JSON),
    )


def _mutated(node: Any, number: int, value: Any) -> Any:
    """Plain data with one of its parts, at any depth, replaced by a value."""
    if not isinstance(node, (dict, list)) or not node or number % 5 == 0:
        return value
    inner = list(node) if isinstance(node, dict) else range(len(node))
    key = inner[number % len(inner)]
    node[key] = _mutated(node[key], number // 5, value)
    return node


def harm(folder: Path, kind: str, which: int, where: int, value: Any) -> None:
    every = sorted(p for p in folder.rglob("*") if p.is_file())
    path = every[which % len(every)]
    content = bytearray(path.read_bytes())
    match kind:
        case "flip" if content:
            content[where % len(content)] ^= 1 + where % 255
            path.write_bytes(content)
        case "cut" if content:
            path.write_bytes(content[: where % len(content)])
        case "grow":
            path.write_bytes(content + b"x")
        case "delete":
            path.unlink()
        case "link":
            path.unlink()
            path.symlink_to(("/etc/hostname", folder.parent, "nowhere", every[0])[where % 4])
        case "extra":
            (folder / f"more-{where}.pt").write_bytes(b"x")
        case "manifest":
            sums = json.loads((folder / files.MANIFEST).read_text())
            (folder / files.MANIFEST).write_text(json.dumps(_mutated(sums, where, value)))
        case "state" | "run":  # and sealed again, as if somebody had meant it
            state = json.loads((folder / "state.json").read_text())
            if kind == "state":
                state = _mutated(state, where, value)
            else:
                state["run"][list(state["run"])[where % len(state["run"])]] = value
            (folder / "state.json").write_text(json.dumps(state))
            (folder / files.MANIFEST).unlink()
            files._seal(folder)


@sizes(20, 1500)
def test_checkpoints(tmp_path: Path, checkpoint: Path, count: int) -> None:
    folder = tmp_path / "run" / "checkpoints" / checkpoint.name

    def check(done: tuple[str, int, int, Any]) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        harm(folder, *done)
        chosen, problems = Checkpoints(tmp_path / "run", 2).newest_whole()
        assert (chosen is None) == (len(problems) == 1)
        try:
            state, parts = read_state(folder)
            rig = Rig(tmp_path / "other", stream={"max_lag": 1})
            Start(folder, state, parts).recall(rig.memory)
            checkpoints = Checkpoints(tmp_path / "run", 2)
            checkpoints.of_step(state.best_step), checkpoints.set_aside_after(state.step)
        except InputError as error:
            return refused(error)
        is_sealed = done[0] in ("none", "state", "run")
        assert is_sealed or files.damage(checkpoint) == files.damage(folder)

    with only_in(tmp_path):
        fuzz(count, check, harms())


@sizes(15, 800)
def test_what_ranks_wrote_of_a_model(tmp_path: Path, count: int) -> None:
    """Also if it is sealed, as if somebody had meant it."""

    def cut(world: int) -> list[tuple[list[Piece], shards.State]]:
        owners = [torch.arange(12.0 / world) for _ in range(world)]
        pieces = [
            [Piece("a", 12 // world * rank, len(own), 12, own, 0)]
            for rank, own in enumerate(owners)
        ]
        number = torch.tensor(3.0)
        states = [{own: {"exp_avg": 2 * own, "step": number}} for own in owners]
        return list(zip(pieces, states, strict=True))

    for rank, (pieces, state) in enumerate(cut(2)):
        shards.write(tmp_path, rank, pieces, state)
    sound = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}

    def check(path: Path, data: st.DataObject) -> None:
        path.write_bytes(data.draw(spoiled(sound[path])))
        try:
            for pieces, _ in cut(3):
                shards.read(tmp_path, pieces, defaultdict(dict))
        except InputError as error:
            refused(error)
        finally:
            path.write_bytes(sound[path])

    with only_in(tmp_path):
        fuzz(count, check, st.sampled_from(list(sound)), st.data())


# ── rewards ───────────────────────────────────────────────────────────────────────────────────────

SIGNS = r"""
\boxed{ } { \frac \sqrt ^ _ $ ( ) [ ] , . - + = % ! & \\ \text{ \pi \left \right \cdot \infty \int
\sum \begin{pmatrix} \end{pmatrix} x e 9 12 0.5 1,000 10^{10} 9^9 A: inf nan 1e999 ٣ ²
"""
PIECES = st.sampled_from([*SIGNS.split(), " ", "\n", "\u2028", "\0"])
MATHS = st.lists(PIECES, max_size=14).map("".join)
TEXTS = MATHS | st.text(max_size=60)
EXTRACTS = [
    *(Extract(kind=kind) for kind in ("text", "first_line", "last_number")),
    ExtractAfter(kind="after", marker="A:"),
]


@sizes(40, 1500)
def test_answers_out_of_texts(tmp_path: Path, count: int) -> None:
    judged = Judged(numeric(NumericReward(kind="numeric")), "numeric", "zero")

    def check(text: str, answer: str) -> None:
        for extract in EXTRACTS:
            found = extractor(extract)(text)
            assert found is None or (isinstance(found, str) and found)
        (score,) = judged.score([rollout(text, answer)])
        assert score.value in (0.0, 1.0)

    with only_in(tmp_path):
        fuzz(count, check, TEXTS, TEXTS, deadline_s=5)


@sizes(5, 300)
def test_mathematics(tmp_path: Path, count: int) -> None:
    """math-verify gets five seconds for each of reading twice and comparing."""
    judged, boxed = Judged(mathematics, "math", "zero"), extractor(Extract(kind="boxed"))

    def check(text: str, answer: str) -> None:
        (score,) = judged.score([rollout(text, answer)])
        assert score.value in (0.0, 1.0)
        with contextlib.suppress(Exception):  # as a vote does, which then counts a fault
            boxed(text)

    with only_in(tmp_path):
        fuzz(count, check, TEXTS, MATHS | st.sampled_from(["5", "x^2", "\\pi"]), deadline_s=30)


@sizes(15, 800)
def test_what_a_reward_server_answers(tmp_path: Path, count: int) -> None:
    asked = {"id": "r", "items": [{"id": f"r.{i}"} for i in range(3)]}
    sound = {"id": "r", "scores": [{"id": f"r.{i}", "score": i / 2} for i in range(3)]}

    def check(body: bytes) -> None:
        try:
            scores = _numbers(body, asked)
        except NoAnswer as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 2000
            return
        assert len(scores) == 3 and all(math.isfinite(score) for score in scores)

    mutated = st.tuples(st.integers(0, 10**6), JSON).map(
        lambda drawn: json.dumps(_mutated(copy.deepcopy(sound), *drawn)).encode()
    )
    with only_in(tmp_path):
        fuzz(count, check, spoiled(json.dumps(sound).encode()) | mutated)


WORDS = """
open('/tmp/x','w') __import__('os') .system('true') ().__class__ [ ] ( ) , x C 9 12 ** ^ / * + - . _
Q ' " ! exec eval input sin Symbol f'{ }'
"""
CODE = st.sampled_from([*WORDS.split(), "lambda: ", " if ", " else ", " for ", " in ", " ", "\n"])


@sizes(5, 200)
def test_verifiers_that_evaluate(tmp_path: Path, count: int) -> None:
    entries = {task: entry_of(task) for task in ("n_queens", "spiral_matrix", "countdown")}
    judge = gym(GymReward(kind="reasoning_gym", strict=False))
    judged = Judged(judge, "reasoning_gym", "zero")

    def check(text: str) -> None:
        for task, entry in entries.items():
            (score,) = judged.score([asked(text, task, entry)])
            assert math.isfinite(score.value)

    with only_in(tmp_path):
        fuzz(count, check, st.lists(CODE, max_size=8).map("".join))


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    violations.clear()
    watched.append(tmp_path / "in")
    (tmp_path / "inside").write_text("x")  # which begins like the one it may write to
    os.system("true")
    (tmp_path / "inside").rename(tmp_path / "outside")
    (tmp_path / "made").mkdir()
    shutil.rmtree(tmp_path / "made")
    watched.clear()
    seen = [v.split()[0] for v in violations]
    assert seen == ["open", "os.system", "os.rename", "os.rename", "os.mkdir", "os.rmdir"]
    violations.clear()


def test_the_sizes_add_up() -> None:
    source = Path(__file__).read_text()
    found = [line for line in source.splitlines() if line.startswith("@sizes(")]
    pairs = np.array([eval(line.removeprefix("@sizes")) for line in found])
    files_of_data = pairs[2] * (len(SOUND) - 1)
    fast, slow = pairs.sum(0) + files_of_data
    assert 150 <= fast <= 250 and slow >= 10_000
