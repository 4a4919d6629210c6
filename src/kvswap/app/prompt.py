"""The text of a conversation: documents first, question last, in the model's chat template or in a plain form.

Pure, apart from the tokenizer that is passed in.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvswap.app.documents import Document
from kvswap.errors import DamagedError, InputError
from kvswap.models import tokens
from kvswap.models.chat_template import apply_template, has_template

PIECE_CHARACTERS = 1 << 14
"""So much text is tokenized at a time while its length is checked."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the user. ``context`` is the text of the documents, empty without any."""

    context: str
    question: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A request and the answer of the model."""

    request: Request
    answer: str


def make_request(question: str, documents: Sequence[Document] = ()) -> Request:
    """Join the documents. Raises InputError when the question is empty, or a text cannot be encoded in UTF-8."""
    if not question.strip():
        raise InputError("the question is empty", hint="ask something")
    for what, text in (("the question", question), *((f"document {each.name}", each.text) for each in documents)):
        _check_encodable(what, text)
    texts = [document.text.strip() for document in documents]
    if len(documents) > 1:  # a name is of use only where there are several documents
        texts = [f"Document {document.name}:\n\n{text}" for document, text in zip(documents, texts, strict=True)]
    return Request("\n\n".join(texts), question.strip())


def _check_encodable(what: str, text: str) -> None:
    """Raise InputError for lone surrogates: what Python makes of bytes that are not UTF-8, and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not UTF-8 text (character {error.start:,})", hint="write it in UTF-8") from error


def check_length(tokenizer: Any, request: Request, limit: int | None) -> None:
    """Refuse a request that is far too long for a model, before all of it is tokenized.

    A text of at most eight characters for each token of ``limit`` is short enough to be tokenized whole. A longer one
    is counted in pieces, and counting stops at twice ``limit`` tokens. A cut between two pieces can change a few tokens
    around it, so a request that is only a little too long passes: ``Conversation.prompt`` gives its exact length.
    Without a limit nothing is checked. Raises InputError.
    """
    if limit is None or len(request.context) + len(request.question) <= 8 * limit:
        return
    count = 0
    for text in (request.context, request.question):
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            count += len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            if count > 2 * limit:
                raise InputError(
                    f"the context has more than {count:,} tokens, and the model's limit is {limit:,}",
                    hint="give fewer or shorter documents, or a model with a longer context",
                )


def room_for_answer(tokens: int, limit: int) -> int:
    """Tokens that an answer to ``tokens`` of prompt may have. Raises InputError where the prompt exceeds ``limit``."""
    if tokens > limit:
        raise InputError(
            f"the context has {tokens:,} tokens, {tokens - limit:,} more than the model's limit of {limit:,}",
            hint="give fewer or shorter documents, or a model with a longer context",
        )
    return limit - tokens + 1  # the last token is never computed with


def render(tokenizer: Any, turns: Sequence[Turn], request: Request) -> str:
    """The text of the earlier turns and the new request, up to where the model answers, for ``encode``.

    Special tokens come from the template alone: what looks like one in a document, question or answer is escaped.
    Raises ModelError where the template fails.
    """

    def plain(text: str) -> str:
        return tokens.escape(tokenizer, text)

    if not has_template(tokenizer):
        return plain("".join(f"{_plain(turn.request)}{turn.answer}\n\n" for turn in turns) + _plain(request))
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": plain(_message(turn.request))})
        messages.append({"role": "assistant", "content": plain(turn.answer)})
    messages.append({"role": "user", "content": plain(_message(request))})
    return apply_template(tokenizer, messages)


def encode(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Token ids of ``text``; ``first`` where it begins the context. A chat template has its own special tokens."""
    return tokens.encode(tokenizer, text, first=first, special=not has_template(tokenizer))


@dataclass(slots=True)
class Conversation:
    """The turns so far, the text that the template made of them, and the token ids of that text."""

    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)

    def prompt(self, tokenizer: Any, request: Request) -> tuple[str, list[int], bool]:
        """Text and token ids of all turns and a new request, and whether they continue ``text`` and ``ids``.

        They do not where the template rewrites earlier turns.
        """
        text = render(tokenizer, self.turns, request)
        if self.ids and text.startswith(self.text):
            return text, self.ids + encode(tokenizer, text[len(self.text) :], first=False), True
        return text, encode(tokenizer, text, first=True), False

    def add(self, tokenizer: Any, request: Request, text: str, ids: list[int], answer_ids: list[int]) -> None:
        """Add a turn: text and ids of the prompt, as ``prompt`` gave them, and the token ids of the answer."""
        self.turns.append(Turn(request, tokens.decode(tokenizer, answer_ids, special=False)))
        self.ids = ids + answer_ids
        self.text = text + _escaped_answer(tokenizer, answer_ids)

    def to_json(self) -> bytes:
        """Turns and text, and the number of token ids; the ids themselves are stored elsewhere."""
        turns = [[turn.request.context, turn.request.question, turn.answer] for turn in self.turns]
        return json.dumps({"turns": turns, "text": self.text, "tokens": len(self.ids)}, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, ids: list[int], label: str) -> Conversation:
        """What ``to_json`` wrote; ``ids`` begin with the token ids of the conversation. Raises DamagedError.

        Without ``data`` nobody has asked anything yet: the first question comes after ``ids``, whoever stored them.
        """
        if not data:
            return cls(ids=ids)
        try:
            found = json.loads(data)
            if found == {}:  # lost in a repair
                return cls()
            turns = [Turn(Request(*_texts(turn[:2])), *_texts(turn[2:])) for turn in found["turns"]]
            (text,), tokens = _texts([found["text"]]), int(found["tokens"])
            if not 0 <= tokens <= len(ids):
                raise ValueError(f"{tokens} tokens")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise DamagedError(f"{label}: its conversation is malformed", hint="try: kvswap sessions repair") from error
        return cls(turns, text, ids[:tokens])


def _escaped_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer as ``render`` would have it: special tokens as they are, the text between them escaped."""
    control = tokens.special_tokens(tokenizer)
    text = ""
    for special, run in itertools.groupby(ids, control.__contains__):
        found = tokens.decode(tokenizer, list(run), special=True)
        text += found if special else tokens.escape(tokenizer, found)
    return text


def _texts(values: Sequence[object]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("not text")
    return [str(value) for value in values]


def _message(request: Request) -> str:
    return f"{request.context}\n\n{request.question}" if request.context else request.question


def _plain(request: Request) -> str:
    head = f"{request.context}\n\n" if request.context else ""
    return f"{head}Question: {request.question}\nAnswer:"
