"""From text to token ids, piece by piece: text stays as given at every seam, and is never taken for markup.

Prompts and sessions call ``encode``. Tokenizers have habits that are right for one whole text and wrong for a piece of
one: some end every text with EOS, some put a space before it. ``encode`` takes both away.

``escape`` is for text of users inside a chat template. It puts a seam after the first character of everything that the
tokenizer would take for a special token. ``encode`` then gives the two sides to the tokenizer apart, so neither is one.
Any thread.
"""

from __future__ import annotations

import re
from typing import Any

_MARK = "\ufdd0"  # Unicode keeps this character for use inside programs
_SEAM, _ITSELF = f"{_MARK}\ufdd2", f"{_MARK}\ufdd1"
_ANCHORS = ("\n", ".", "a")


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens by id."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))


def escape(tokenizer: Any, text: str) -> str:
    """Text for a template, in which nothing is a special token. ``encode`` undoes the escapes."""
    text = text.replace(_MARK, _ITSELF)
    texts = sorted({token for token in special_tokens(tokenizer).values() if len(token) > 1})
    if not texts:
        return text
    begins = re.compile(f"(?=(?:{'|'.join(map(re.escape, texts))}))(.)", re.DOTALL)
    return begins.sub(lambda match: match[1] + _SEAM, text)


def encode(tokenizer: Any, text: str, *, first: bool, special: bool) -> list[int]:
    """Token ids of a piece of a context.

    Parameters
    ----------
    text
        May have parts that ``escape`` made.
    first
        Whether the piece begins the context.
    special
        Whether the tokenizer's own special tokens go before it, such as BOS; only where ``first``.
    """
    head, *rest = (piece.replace(_ITSELF, _MARK) for piece in text.split(_SEAM))
    if not first:
        ids = _continue(tokenizer, head)
    elif special:
        ids = _begin(tokenizer, head)
    else:
        ids = _plain(tokenizer, head)
    return ids + [each for piece in rest for each in _continue(tokenizer, piece)]


def decode(tokenizer: Any, ids: list[int], *, special: bool) -> str:
    """Text of token ids, with or without the special ones."""
    text: str = tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return text


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _begin(tokenizer: Any, text: str) -> list[int]:
    """With what the tokenizer puts before a text, and without what it puts after: the context goes on."""
    plain = _plain(tokenizer, text)
    whole: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[: start + len(plain)]
    return whole


def _continue(tokenizer: Any, text: str) -> list[int]:
    """Without the space that some tokenizers put before every text."""
    ids = _plain(tokenizer, text)
    letter = _plain(tokenizer, "a")
    if not text or decode(tokenizer, letter + letter, special=False) == "aa":
        return ids
    for anchor in _ANCHORS:
        before, whole = _plain(tokenizer, anchor), _plain(tokenizer, anchor + text)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return ids
