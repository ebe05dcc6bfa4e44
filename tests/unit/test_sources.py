"""Rows out of files and tasks, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ppo_dist.config.base import InputError
from ppo_dist.config.data import FileSource, GymSource, HubSource
from ppo_dist.data.readers import held_out_part
from ppo_dist.data.sources import read

ROWS = [{"prompt": "1+1=", "response": "2.", "answer": 2}, {"prompt": "2+2=", "response": "4."}]
SPELL = {"task": "spell_backward", "options": {"min_word_len": 3, "max_word_len": 5}}


def jsonl(folder: Path, *lines: object) -> FileSource:
    path = folder / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return FileSource(path=str(path))


def labelled(source: object) -> list[tuple]:
    rows = read([source], "labelled", "labelled", needs_answer=True)  # type: ignore[list-item]
    return [(r.uid, r.where, r.prompt, r.response, r.answer, r.checker) for r in rows]


def expected(path: Path | str, unit: str, numbers: tuple[int, int]) -> list[tuple]:
    first, second = (f"{path}, {unit} {n}" for n in numbers)
    return [
        ("labelled/0:0", first, "1+1=", "2.", "2", None),
        ("labelled/0:1", second, "2+2=", "4.", "4.", None),
    ]


def test_jsonl_counts_lines_and_skips_blank_ones(tmp_path: Path) -> None:
    source = jsonl(tmp_path, ROWS[0], "", "  ", ROWS[1])
    assert labelled(source) == expected(source.path, "line", (1, 4))


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    assert labelled(FileSource(path=str(path))) == expected(path, "row", (1, 2))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert labelled(FileSource(path=str(path))) == expected(path, "row", (1, 2))


@pytest.mark.parametrize("split", [None, "train"])
def test_hugging_face_folder(tmp_path: Path, split: str | None) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    saved = dataset if split is None else datasets.DatasetDict({split: dataset})
    saved.save_to_disk(str(tmp_path / "set"))
    source = HubSource(kind="huggingface", path=str(tmp_path / "set"))
    assert labelled(source) == expected(tmp_path / "set", "row", (1, 2))


def test_hugging_face_folder_without_the_split(tmp_path: Path) -> None:
    import datasets

    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(str(tmp_path / "set"))
    source = HubSource(kind="huggingface", path=str(tmp_path / "set"), split="test")
    with pytest.raises(
        InputError, match=r"set: cannot be loaded as a Hugging Face dataset: .*test"
    ):
        labelled(source)


def test_sources_are_numbered(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    rows = read([jsonl(one, *ROWS), jsonl(two, ROWS[1])], "verifiable", "verifiable", False)
    assert [r.uid for r in rows] == ["verifiable/0:0", "verifiable/0:1", "verifiable/1:0"]


def said(source: object, origin: str = "labelled", needs_answer: bool = True) -> str:
    with pytest.raises(InputError) as error:
        read([source], origin, origin, needs_answer)  # type: ignore[list-item, arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not valid JSON"),
        ("[1, 2]", "a row must be an object"),
        ('{"response": "x"}', "'prompt' is missing or empty (the row has: response)"),
        ('{"prompt": "", "response": "x"}', "'prompt' is missing or empty"),
        ('{"prompt": 5, "response": "x"}', "'prompt' must be a text or a list of messages"),
        ('{"prompt": [], "response": "x"}', "'prompt' must be a text or a list of messages"),
        ('{"prompt": [{"role": "user"}], "response": "x"}', "must be a text or a list of messages"),
        ('{"prompt": ["hi"], "response": "x"}', "must be a text or a list of messages"),
        ('{"prompt": "p"}', "'response' must be a text with something in it (the row has: prompt)"),
        ('{"prompt": "p", "response": ""}', "'response' must be a text with something in it"),
        ('{"prompt": "p", "response": 7}', "'response' must be a text with something in it"),
        (
            '{"prompt": "p", "response": "r", "answer": [1]}',
            "'answer' must be a text or a finite number",
        ),
        (
            '{"prompt": "p", "response": "r", "answer": true}',
            "'answer' must be a text or a finite number",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, reason: str) -> None:
    source = jsonl(tmp_path, ROWS[0], line)
    message = said(source)
    assert message.startswith(f"{source.path}, line 2: ")
    assert reason in message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    assert f"{path}, line 1: not valid JSON" in said(FileSource(path=str(path)))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text(text)
    assert said(FileSource(path=str(path))) == f"data.labelled: {path} has no rows"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert said(FileSource(path=str(tmp_path / "no.jsonl"))) == f"{tmp_path}/no.jsonl: no such file"
    for name, content, reason in (
        ("rows.csv", "prompt\n", "cannot read .csv; .jsonl, .json and .parquet are allowed"),
        ("rows", "x", "cannot read a file without an ending"),
        ("rows.json", "{", "not valid JSON"),
        ("list.json", '{"prompt": "x"}', "must hold one list of objects"),
        ("rows.parquet", "no table", "not a readable Parquet file"),
    ):
        (tmp_path / name).write_text(content)
        assert said(FileSource(path=str(tmp_path / name))).startswith(
            f"{tmp_path}/{name}: {reason}"
        )


def test_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (row,) = read([jsonl(tmp_path, {"prompt": chat})], "verifiable", "verifiable", False)
    assert row.prompt == chat
    assert row.answer is None


def test_unlabelled_rows_lose_their_answers(tmp_path: Path) -> None:
    gym = GymSource(kind="reasoning_gym", size=3, split="train", **SPELL)
    sources = [jsonl(tmp_path, *ROWS), gym]
    rows = read(sources, "unlabelled", "unlabelled", needs_answer=False)
    assert len(rows) == 5
    assert {(r.response, r.answer, r.checker) for r in rows} == {(None, None, None)}
    assert rows[0].prompt == "1+1="


def test_verifiable_rows_have_an_answer_and_no_response(tmp_path: Path) -> None:
    (row,) = read([jsonl(tmp_path, ROWS[0])], "verifiable", "verifiable", needs_answer=True)
    assert (row.response, row.answer) == (None, "2")
    source = jsonl(tmp_path, ROWS[1])
    message = said(source, "verifiable")
    assert message.startswith(f"{source.path}, line 1: 'answer' is missing")
    assert read([source], "verifiable", "verifiable", needs_answer=False)[0].answer is None


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (-2.5, "-2.5"), (0, "0")])
def test_numeric_answers_become_text(tmp_path: Path, number: float, text: str) -> None:
    source = jsonl(tmp_path, {"prompt": "p", "answer": number})
    assert read([source], "verifiable", "verifiable", True)[0].answer == text


def test_columns_and_templates(tmp_path: Path) -> None:
    fields = {"q": "3+4", "gold": {"n": 7}, "a": 7}
    source = FileSource(
        path=jsonl(tmp_path, fields).path,
        columns={"answer": "a"},
        prompt_template="{q} =\n",
        response_template=" {gold[n]}",
    )
    (row,) = read([source], "labelled", "labelled", needs_answer=True)
    assert (row.prompt, row.response, row.answer) == ("3+4 =\n", " 7", "7")


@pytest.mark.parametrize("template", ["{nope}", "{0}", "{", "{year:d}", "{q.n}", "{q[n]}"])
def test_a_template_that_does_not_fit(tmp_path: Path, template: str) -> None:
    rows = jsonl(tmp_path, {"q": "x", "year": None})
    message = said(FileSource(path=rows.path, prompt_template=template), "verifiable", False)
    assert message.startswith(f"{rows.path}, line 1: the template does not fit the row: ")
    assert message.endswith("(the row has: q, year)")


def questions(seed: int, split: str, size: int = 60) -> list[str]:
    source = GymSource(kind="reasoning_gym", size=size, seed=seed, split=split, **SPELL)
    rows = read([source], "verifiable", "verifiable", needs_answer=True)
    assert all(r.checker is not None and r.checker.task == "spell_backward" for r in rows)
    return [str(r.prompt) for r in rows]


def test_gym_questions_are_distinct_and_splits_never_meet() -> None:
    train = {seed: questions(seed, "train") for seed in (0, 1, 2)}
    held = {seed: questions(seed, "held_out") for seed in (0, 1, 7)}
    for rows in [*train.values(), *held.values()]:
        assert len(set(rows)) == 60
    assert train[0] != train[1]
    assert not set().union(*train.values()) & set().union(*held.values())
    assert all(held_out_part(q) for q in held[7])
    assert not any(held_out_part(q) for q in train[2])


def test_gym_split_ignores_case_and_white_space() -> None:
    texts = [f"Spell word {i}" for i in range(200)]
    assert [held_out_part(t) for t in texts] == [held_out_part(f" {t.upper()}\n") for t in texts]
    assert 20 < sum(map(held_out_part, texts)) < 60  # about a fifth


def test_gym_rows_follow_from_the_seed() -> None:
    assert questions(3, "train", 10) == questions(3, "train", 10)
    source = GymSource(
        kind="reasoning_gym", size=1, split="train", prompt_template="{word}>", **SPELL
    )
    (row,) = read([source], "labelled", "labelled", needs_answer=True)
    word = str(row.prompt)[:-1]
    assert row.prompt == f"{word}>"
    assert row.response == row.answer == word[::-1]
    assert row.checker.entry["metadata"]["word"] == word
    assert row.checker.options == SPELL["options"]


def test_gym_faults() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = GymSource(
        kind="reasoning_gym", task="chain_sum", size=5000, split="held_out", options=few
    )
    message = said(source, "verifiable")
    assert message.startswith("reasoning_gym chain_sum: has only ")
    assert message.endswith("different held_out questions with these options, 5000 were asked for")
    unknown = GymSource(kind="reasoning_gym", task="no_such_task", size=1, split="train")
    assert said(unknown, "verifiable").startswith("reasoning_gym no_such_task: ")
    odd = GymSource(
        kind="reasoning_gym", task="chain_sum", size=1, split="train", options={"terms": 3}
    )
    assert said(odd, "verifiable").startswith("reasoning_gym chain_sum: ")
