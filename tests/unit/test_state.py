"""Folders that are whole or not there, checkpoints, and the files of a run that is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from ppo_dist import files
from ppo_dist.config import Config, InputError
from ppo_dist.coordinator.state import Checkpoints, RunState, read_state
from ppo_dist.learner import shards
from ppo_dist.run import _starting_point
from ppo_dist.tracking.local import JsonLines, read_rows, record_event
from tests.conftest import raw_config


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with files.sealed(tmp_path / "step-1") as made:
        (made / "inner").mkdir()
        (made / "inner" / "weights.bin").write_bytes(bytes(range(256)))
        (made / "state.json").write_text("{}")
    return tmp_path / "step-1"


def test_a_sealed_folder_is_whole(sealed: Path) -> None:
    assert files.damage(sealed) is None
    assert [p.name for p in sealed.parent.iterdir()] == ["step-1"]
    assert set(json.loads((sealed / files.MANIFEST).read_text())) == {
        "inner/weights.bin",
        "state.json",
    }


def test_a_missing_file_is_named(sealed: Path) -> None:
    (sealed / "inner" / "weights.bin").unlink()
    assert files.damage(sealed) == "step-1: inner/weights.bin is missing"


@pytest.mark.parametrize("position", [0, 100, 255])
def test_a_flipped_byte_is_found(sealed: Path, position: int) -> None:
    path = sealed / "inner" / "weights.bin"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))
    assert files.damage(sealed) == ("step-1: inner/weights.bin is damaged (its checksum differs)")


def test_a_cut_off_file_is_found(sealed: Path) -> None:
    (sealed / "state.json").write_text("{")
    for is_quick in (False, True):
        problem = files.damage(sealed, is_quick)
        assert problem == "step-1: state.json is damaged (its size differs)"


@pytest.mark.parametrize("text", [None, "", '{"a": ', "[]"])
def test_a_manifest_that_is_none(sealed: Path, text: str | None) -> None:
    (sealed / files.MANIFEST).unlink()
    if text is not None:
        (sealed / files.MANIFEST).write_text(text)
    assert files.damage(sealed) == f"step-1: {files.MANIFEST} is missing or unreadable"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert files.damage(tmp_path / "nowhere") == "nowhere: manifest.json is missing or unreadable"


def test_seal_takes_the_place_of_an_older_folder(sealed: Path, tmp_path: Path) -> None:
    with files.sealed(sealed) as made:
        (made / "state.json").write_text("[1]")
    assert files.damage(sealed) is None
    assert (sealed / "state.json").read_text() == "[1]"
    assert not (sealed / "inner").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def written(run: Path, keep: int, steps: range) -> list[Path]:
    checkpoints = Checkpoints(run, keep)
    return [
        checkpoints.write(
            RunState(step=step, version=step + 1, best=0.25, best_step=1),
            {"stream": {"taken": 10 * step}},
            lambda folder, step=step: (folder / "weights.bin").write_bytes(bytes([step] * 9)),
        )
        for step in steps
    ]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folders = written(tmp_path, 2, range(8, 12))
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert folders[-1] == tmp_path / "checkpoints" / "step-00000011"
    assert Checkpoints(tmp_path, 2).newest_whole() == (folders[-1], [])


def test_later_checkpoints_are_set_aside_by_a_run_that_goes_on_before_them(tmp_path: Path) -> None:
    written(tmp_path, 3, range(8, 12))
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.set_aside_after(9) == [
        "abandoned-step-00000010",
        "abandoned-step-00000011",
    ]
    (folder,) = written(tmp_path, 1, range(10, 11))
    assert checkpoints.newest_whole() == (folder, []), "what it makes itself is its newest"
    assert checkpoints.set_aside_after(9) == ["abandoned-step-00000010"], "a second time too"


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, 1, range(3, 4))
    state, parts = read_state(folder)
    assert state == RunState(step=3, version=4, best=0.25, best_step=1)
    assert parts == {"stream": {"taken": 30}}
    assert (folder / "weights.bin").read_bytes() == b"\x03" * 9


def test_a_checkpoint_may_be_written_again(tmp_path: Path) -> None:
    written(tmp_path, 2, range(3, 4))
    (tmp_path / "checkpoints" / ".step-00000003.writing").mkdir()
    (tmp_path / "checkpoints" / ".step-00000003.writing" / "left over").touch()
    (folder,) = written(tmp_path, 2, range(3, 4))
    assert names(tmp_path) == ["step-00000003"]
    assert not (folder / "left over").exists()
    assert files.damage(folder) is None


def test_a_save_that_fails_leaves_the_older_ones(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, 1, range(1, 2))

    def full(aside: Path) -> None:
        (aside / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Checkpoints(tmp_path, 1).write(RunState(step=2), {}, full)
    assert Checkpoints(tmp_path, 1).newest_whole() == (folder, [])


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path: Path) -> None:
    one, two, three = written(tmp_path, 3, range(1, 4))
    (three / files.MANIFEST).unlink()
    (two / "weights.bin").write_bytes(b"different")
    newest, problems = Checkpoints(tmp_path, 3).newest_whole()
    assert newest == one
    assert problems == [
        "step-00000003: manifest.json is missing or unreadable",
        "step-00000002: weights.bin is damaged (its checksum differs)",
    ]
    (one / "state.json").unlink()
    newest, problems = Checkpoints(tmp_path, 3).newest_whole()
    assert newest is None
    assert problems[-1] == "step-00000001: state.json is missing"


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 3).newest_whole() == (None, [])


def test_reading_a_damaged_checkpoint_says_what_is_wrong(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, 1, range(1, 2))
    (folder / "weights.bin").unlink()
    with pytest.raises(InputError) as error:
        read_state(folder)
    assert str(error.value) == (
        f"cannot resume from {folder}: step-00000001: weights.bin is missing"
    )


@pytest.mark.parametrize(("step", "is_later"), [(2, True), (4, False), (5, False)])
def test_going_on_from_before_the_best_policy_sets_it_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, is_later: bool
) -> None:
    """Else the summary would name an earlier step than its."""
    chosen = written(tmp_path, 9, range(1, 6))[step - 1]
    tracker = JsonLines(tmp_path, None)
    for at, accuracy in enumerate([0.1, 0.3, None, 0.5, 0.5], start=1):
        tracker.log(at, {f"eval/held_out/{key}": accuracy for key in ("accuracy", "reward")})
    tracker.close()
    (tmp_path / "policy-best").mkdir()
    monkeypatch.setattr(shards, "ranks", lambda _: 1)
    config = Config.model_validate(raw_config(tmp_path))
    _starting_point(config, tmp_path, chosen, Console(quiet=True))
    assert (tmp_path / "policy-best").exists() != is_later
    assert (tmp_path / "abandoned-policy-best").exists() == is_later


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "5"), ("step", None), ("step", -5), ("version", 1.0), ("skipped", True)],
)
def test_a_state_of_other_types_says_which(tmp_path: Path, name: str, value: object) -> None:
    content = {"run": {"step": 5, "best": 1, name: value}, "parts": {}}
    (tmp_path / "state.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"state.json is not of this version: {name} is {value!r}"):
        read_state(tmp_path, is_whole=True)


def test_the_reward_decides_where_accuracies_are_equal() -> None:
    """Those of rewards that never reach 1 all are."""
    assert RunState().is_beaten_by(0.0, -1.0)
    best = RunState(step=4).with_best(0.0, -1.0)
    assert best == RunState(step=4, best=0.0, best_reward=-1.0, best_step=4)
    assert best.is_beaten_by(0.0, -0.5) and best.is_beaten_by(0.1, -2.0)
    assert not best.is_beaten_by(0.0, -1.0) and not best.is_beaten_by(0.0, -2.0)
    assert not RunState(best=0.5, best_step=2).is_beaten_by(0.5, 9.0), "of an earlier version"


def test_a_guard_that_could_not_roll_back_is_refused_before_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 9, range(2, 4))  # the best is that of step 1
    monkeypatch.setattr(shards, "ranks", lambda _: 1)
    guard = {"guard": {"kl": {"limit": 1.0, "action": "roll_back"}}}
    config = Config.model_validate(raw_config(tmp_path, semi=guard, eval={"every": 1}))
    with pytest.raises(InputError, match=r"that of step 1, which has no checkpoint"):
        _starting_point(config, tmp_path, True, Console(quiet=True))
    written(tmp_path, 9, range(1, 2))
    assert _starting_point(config, tmp_path, True, Console(quiet=True)).state.step == 3


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]]


def logged(folder: Path, after_step: int | None, steps: range, response: str = "é") -> None:
    tracker = JsonLines(folder, after_step)
    for step in steps:
        tracker.log(step, {"reward": step / 2, "loss": None})
        tracker.table(step, [{"response": f"{response}{i}"} for i in range(2)])
    tracker.close()


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    logged(tmp_path, None, range(1, 3))
    assert lines(tmp_path, "metrics.jsonl") == [
        {"step": 1, "reward": 0.5, "loss": None},
        {"step": 2, "reward": 1.0, "loss": None},
    ]
    assert lines(tmp_path, "samples.jsonl") == [
        {"step": step, "response": f"é{i}"} for step in (1, 2) for i in range(2)
    ]


def test_a_step_that_is_logged_outlives_the_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint comes after is not made again."""
    kept: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        kept[status.st_ino] = status.st_size

    tracker = JsonLines(tmp_path, None)
    monkeypatch.setattr(os, "fsync", fsync)
    tracker.table(1, [{"response": "a"}])
    tracker.log(1, {"reward": 0.5})
    written = [(tmp_path / f"{name}.jsonl").stat() for name in ("samples", "metrics")]
    assert kept == {status.st_ino: status.st_size for status in written}
    tracker.close()


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    logged(tmp_path, None, range(0, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # the run was killed in the middle of a line
    logged(tmp_path, 3, range(4, 5))
    assert [row["step"] for row in lines(tmp_path, "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in lines(tmp_path, "samples.jsonl")] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert lines(tmp_path, "metrics.jsonl")[3] == {"step": 3, "reward": 1.5, "loss": None}


def test_a_new_run_starts_anew(tmp_path: Path) -> None:
    logged(tmp_path, None, range(0, 6))
    logged(tmp_path, None, range(0, 1))
    assert [row["step"] for row in lines(tmp_path, "metrics.jsonl")] == [0]
    assert len(lines(tmp_path, "samples.jsonl")) == 2


@pytest.mark.parametrize("separator", ["\n", "\r", "\u2028", "\x85", "\x0c"])
def test_a_response_may_hold_any_line_separator(tmp_path: Path, separator: str) -> None:
    logged(tmp_path, None, range(1, 4), response=f"a{separator}b")
    logged(tmp_path, 2, range(3, 4), response="c")
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert rows[0]["response"] == f"a{separator}b0"


def test_read_rows_of_nothing(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []


def test_events(tmp_path: Path) -> None:
    record_event(tmp_path, "resumed", step=3)
    record_event(tmp_path, "done")
    first, second = read_rows(tmp_path / "events.jsonl")
    assert (first["event"], first["step"]) == ("resumed", 3)
    assert second["event"] == "done"
    assert first["time"] <= second["time"]


def test_a_row_that_was_cut_off_within_a_character_is_left_out(tmp_path: Path) -> None:
    logged(tmp_path, None, range(1, 3))
    path = tmp_path / "samples.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("é".encode()) + 1])
    assert [row["response"] for row in read_rows(path)] == ["é0", "é1", "é0"]
    logged(tmp_path, 1, range(2, 3))
    assert path.read_bytes() == content.replace("é".encode(), b"\\u00e9", 2)
