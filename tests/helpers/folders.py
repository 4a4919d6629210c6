"""Tiny models as directories, with a tokenizer of bytes: what a user would name on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>")


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text comes back from its tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i + len(SPECIAL) for i, c in enumerate(alphabet)} | specials(), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def specials() -> dict[str, int]:
    """Ids of the special tokens."""
    return {token: number for number, token in enumerate(SPECIAL)}


def only_spaces(tokenizer: Any) -> list[list[Any]]:
    """A ``sequence_bias`` that makes every token a space: text is streamed word by word, so each comes at once."""
    return [[tokenizer(" ", add_special_tokens=False)["input_ids"], 1000.0]]


def save_tiny(folder: Path, family: str = "llama", chat_template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    """Write a tiny model and its tokenizer; returns the folder."""
    vocabulary = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL)
    tiny_model(family, vocab_size=vocabulary, **changes).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder
