"""Rows to tokens, with the tokenizer's own chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppo_dist.config.base import InputError, Origin
from ppo_dist.config.data import Data
from ppo_dist.data.sources import Row
from ppo_dist.types import Ints, LabelledExample, Prompt


class Encoder:
    """Turns rows into prompts and labelled examples; counts what it had to drop or truncate in
    `counts`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "model: its tokenizer has no end-of-sequence token, so no response could end"
            )
        self._tokenizer = tokenizer
        self._data = data
        self.counts: Counter[str] = Counter()

    def prompts(self, rows: Sequence[Row], origin: Origin) -> list[Prompt]:
        """Prompts of the rows that fit `data.max_prompt_tokens`, or were cut to fit.

        Raises:
            InputError: a prompt is too long and `data.overlong` is error, or the chat template
                refuses it.
        """
        return [p for row in rows if (p := self._prompt(row, origin, self._text(row))) is not None]

    def examples(self, rows: Sequence[Row]) -> list[LabelledExample]:
        """Labelled examples whose response tokens end with the end-of-sequence token. Raises as
        `prompts` does.
        """
        examples = []
        for row in rows:
            prompt = self._prompt(row, "labelled", text := self._text(row))
            if prompt is not None and row.response is not None:
                tokens_R = self._response(row, text, row.response)
                examples.append(LabelledExample(prompt, row.response, tokens_R))
        return examples

    def _is_chat(self, row: Row) -> bool:
        return self._data.chat or not isinstance(row.prompt, str)

    def _text(self, row: Row) -> str:
        if isinstance(row.prompt, str) and not self._data.chat:
            return row.prompt
        return self._templated(row, _messages(row), add_generation_prompt=True)

    def _templated(
        self, row: Row, messages: list[dict[str, str]], add_generation_prompt: bool
    ) -> str:
        if not self._tokenizer.chat_template:
            raise InputError(
                f"{row.where}: is a chat, but the model's tokenizer has no chat template"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's makers: it may refuse with anything
            raise InputError(f"{row.where}: the chat template refuses it: {error}") from None
        return str(text)

    def _tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        # not verbose: what is too long is told by name, later
        found = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(found["input_ids"])

    def _prompt(self, row: Row, origin: Origin, text: str) -> Prompt | None:
        tokens = self._tokens(text, not self._is_chat(row))
        if tokens and tokens[-1] == self._tokenizer.eos_token_id and not self._is_chat(row):
            tokens = tokens[:-1]
        limit = self._data.max_prompt_tokens
        if not tokens:
            raise InputError(f"{row.where}: its prompt has no tokens")
        if len(tokens) > limit:
            match self._data.overlong:
                case "error":
                    raise InputError(
                        f"{row.where}: prompt of {len(tokens)} tokens, "
                        f"data.max_prompt_tokens is {limit}"
                    )
                case "drop":
                    self.counts["dropped"] += 1
                    return None
                case "truncate":
                    self.counts["truncated"] += 1
                    tokens = tokens[-limit:]
        return Prompt(row.uid, origin, text, np.asarray(tokens, np.int64), row.answer, row.checker)

    def _response(self, row: Row, prompt_text: str, response: str) -> Ints:
        """The tokens that the policy should write: the response and what ends its turn in the chat
        template.
        """
        eos = self._tokenizer.eos_token_id
        text = response
        if self._is_chat(row):
            whole = self._templated(
                row,
                [*_messages(row), {"role": "assistant", "content": response}],
                add_generation_prompt=False,
            )
            if whole.startswith(prompt_text):
                text = whole[len(prompt_text) :]
        tokens = self._tokens(text, False)
        if eos in tokens:
            tokens = tokens[: tokens.index(eos)]
        return np.asarray([*tokens, eos], np.int64)


def _messages(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
