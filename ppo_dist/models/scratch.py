"""A small model made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ppo_dist.config.data import FromScratch

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def make_model(folder: Path, shape: FromScratch, texts: Iterable[str], seed: int) -> None:
    """Writes a GPT-2 with random weights, and a tokenizer with a token for each character of the
    texts, as a Hugging Face folder. The same arguments make the same files.
    """
    tokenizer = _character_tokenizer(texts)
    tokenizer.model_max_length = shape.context
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=shape.context,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu",  # GPT-2's own, by tanh, is up to four times slower on CPUs
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    characters = sorted({character for text in texts for character in text})
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
