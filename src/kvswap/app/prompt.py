"""The text of a conversation: documents first, question last, in the model's chat template or in a plain form.

Pure, apart from the tokenizer that is passed in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvswap.app.documents import Document
from kvswap.errors import DamagedError, InputError


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
    """Join the documents. Raises InputError when the question is empty."""
    if not question.strip():
        raise InputError("the question is empty", hint="ask something")
    texts = [document.text.strip() for document in documents]
    if len(documents) > 1:  # a name is of use only where there are several documents
        texts = [f"Document {document.name}:\n\n{text}" for document, text in zip(documents, texts, strict=True)]
    return Request("\n\n".join(texts), question.strip())


def has_template(tokenizer: Any) -> bool:
    """Whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, turns: Sequence[Turn], request: Request) -> str:
    """The text of the earlier turns and the new request, up to where the model answers."""
    if not has_template(tokenizer):
        return "".join(f"{_plain(turn.request)}{turn.answer}\n\n" for turn in turns) + _plain(request)
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": _message(turn.request)})
        messages.append({"role": "assistant", "content": turn.answer})
    messages.append({"role": "user", "content": _message(request)})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def encode(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Token ids of ``text``; ``first`` where it begins the context. A chat template has its own special tokens."""
    special = first and not has_template(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


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
        whole = {"clean_up_tokenization_spaces": False}
        self.turns.append(Turn(request, tokenizer.decode(answer_ids, skip_special_tokens=True, **whole)))
        self.ids = ids + answer_ids
        self.text = text + tokenizer.decode(answer_ids, skip_special_tokens=False, **whole)

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


def _texts(values: Sequence[object]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("not text")
    return [str(value) for value in values]


def _message(request: Request) -> str:
    return f"{request.context}\n\n{request.question}" if request.context else request.question


def _plain(request: Request) -> str:
    head = f"{request.context}\n\n" if request.context else ""
    return f"{head}Question: {request.question}\nAnswer:"
