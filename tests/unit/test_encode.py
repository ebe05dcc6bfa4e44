"""Rows to tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ppo_dist.config.base import InputError
from ppo_dist.config.data import Data, FromScratch
from ppo_dist.data.encode import Encoder
from ppo_dist.data.sources import Row
from ppo_dist.models.scratch import EOS, make_model

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789+=>[]\n"
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model") / "tiny"
    make_model(made, FromScratch(layers=1, hidden=8, heads=1, context=64), [CHARACTERS], seed=0)
    return made


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def data(**values: object) -> Data:
    return Data.model_validate(values)


def row(prompt: object, response: str | None = None, answer: str | None = None) -> Row:
    return Row("v/0:0", "rows.jsonl, line 1", prompt, response, answer, None)  # type: ignore[arg-type]


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(text))


def test_a_prompt_keeps_what_its_row_says(tokenizer: PreTrainedTokenizerBase) -> None:
    (prompt,) = Encoder(tokenizer, data()).prompts([row("1+1=", answer="2")], "verifiable")
    assert prompt.tokens_P.tolist() == ids(tokenizer, "1+1=")
    assert tokenizer.unk_token_id not in prompt.tokens_P
    assert (prompt.uid, prompt.origin, prompt.text) == ("v/0:0", "verifiable", "1+1=")
    assert (prompt.answer, prompt.checker) == ("2", None)


def test_overlong_prompts_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(max_prompt_tokens=4))
    kept = encoder.prompts([row("abcd"), row("abcde"), row("abc"), row("abcdef")], "verifiable")
    assert [p.text for p in kept] == ["abcd", "abc"]
    assert encoder.counts == {"dropped": 2}
    assert encoder.examples([row("abcde", "x")]) == []
    assert encoder.counts == {"dropped": 3}


def test_truncation_keeps_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(max_prompt_tokens=4, overlong="truncate"))
    kept = encoder.prompts([row("abcd"), row("abcdef")], "verifiable")
    assert [p.tokens_P.tolist() for p in kept] == [ids(tokenizer, "abcd"), ids(tokenizer, "cdef")]
    assert encoder.counts == {"truncated": 1}


def test_an_overlong_prompt_may_be_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, data(max_prompt_tokens=4, overlong="error"))
    assert len(encoder.prompts([row("abcd")], "verifiable")) == 1
    with pytest.raises(InputError) as error:
        encoder.prompts([row("abcde")], "verifiable")
    assert str(error.value) == (
        "rows.jsonl, line 1: prompt of 5 tokens, data.max_prompt_tokens is 4"
    )


@pytest.mark.parametrize("response", ["42", f"42{EOS}", f"42{EOS}7{EOS}"])
def test_a_response_ends_with_eos_exactly_once(
    tokenizer: PreTrainedTokenizerBase, response: str
) -> None:
    (example,) = Encoder(tokenizer, data()).examples([row("6+", response)])
    assert example.tokens_R.tolist() == [*ids(tokenizer, "42"), tokenizer.eos_token_id]
    assert example.prompt.tokens_P.tolist() == ids(tokenizer, "6+")
    assert example.prompt.origin == "labelled"


def test_an_eos_that_the_tokenizer_adds_to_prompts_is_taken_off(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (prompt,) = Encoder(tokenizer, data()).prompts([row(f"ab{EOS}")], "verifiable")
    assert prompt.tokens_P.tolist() == ids(tokenizer, "ab")


def test_a_prompt_without_tokens_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: its prompt has no tokens"):
        Encoder(tokenizer, data()).prompts([row(EOS)], "verifiable")


def test_a_tokenizer_without_eos_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="model: its tokenizer has no end-of-sequence token"):
        Encoder(tokenizer, data())


def test_a_row_without_response_makes_no_example(tokenizer: PreTrainedTokenizerBase) -> None:
    assert Encoder(tokenizer, data()).examples([row("ab")]) == []


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]


@pytest.mark.parametrize(
    ("prompt", "chat", "text"),
    [
        (MESSAGES, False, "[system]be brief\n[user]1+1\n[assistant]"),
        ("1+1", True, "[user]1+1\n[assistant]"),
    ],
)
def test_the_loss_falls_on_the_assistants_turn_alone(
    tokenizer: PreTrainedTokenizerBase, prompt: object, chat: bool, text: str
) -> None:
    tokenizer.chat_template = CHAT
    (example,) = Encoder(tokenizer, data(chat=chat)).examples([row(prompt, "2")])
    turns = MESSAGES if isinstance(prompt, list) else MESSAGES[1:]
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "2"}], tokenize=False
    )
    assert example.prompt.text == text
    assert whole.startswith(example.prompt.text)
    assert example.prompt.tokens_P.tolist() == ids(tokenizer, text)
    # the template's own end of turn (eos, new line) is cut after the eos
    assert example.tokens_R.tolist() == [*ids(tokenizer, "2"), tokenizer.eos_token_id]


def test_what_ends_the_turn_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """Turns that end with something else than eos: that is part of the response, then eos."""
    tokenizer.chat_template = CHAT.replace("{{ eos_token }}", "[]")
    (example,) = Encoder(tokenizer, data(chat=True)).examples([row("1+1", "2")])
    assert example.tokens_R.tolist() == [*ids(tokenizer, "2[]\n"), tokenizer.eos_token_id]


def test_a_generation_prompt_that_no_turn_begins_with(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT.replace("}[assistant]{", "}[assistant]think{")
    (example,) = Encoder(tokenizer, data(chat=True)).examples([row("1+1", "2")])
    assert example.prompt.text.endswith("[assistant]think")
    assert example.tokens_R.tolist() == [*ids(tokenizer, "2"), tokenizer.eos_token_id]


def test_without_chat_a_template_does_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT
    (example,) = Encoder(tokenizer, data()).examples([row("1+1=", "2")])
    assert example.prompt.tokens_P.tolist() == ids(tokenizer, "1+1=")


@pytest.mark.parametrize(("prompt", "chat"), [(MESSAGES, False), ("1+1", True)])
def test_chat_without_a_template(
    tokenizer: PreTrainedTokenizerBase, prompt: object, chat: bool
) -> None:
    with pytest.raises(InputError) as error:
        Encoder(tokenizer, data(chat=chat)).prompts([row(prompt)], "verifiable")
    assert str(error.value) == (
        "rows.jsonl, line 1: is a chat, but the model's tokenizer has no chat template"
    )


def test_a_template_that_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InputError, match="line 1: the chat template refuses it: no system turns"):
        Encoder(tokenizer, data()).prompts([row(MESSAGES)], "verifiable")


def test_the_same_arguments_make_the_same_model(folder: Path, tmp_path: Path) -> None:
    shape = FromScratch(layers=1, hidden=8, heads=1, context=64)
    for name, seed in (("same", 0), ("other", 1)):
        make_model(tmp_path / name, shape, [CHARACTERS], seed)
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (folder / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
