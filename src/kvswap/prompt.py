"""The text of a conversation: documents first, question last, in the model's chat template or in a plain form.

Pure but for the tokenizer that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvswap.documents import Document
from kvswap.errors import InputError


@dataclass(frozen=True, slots=True)
class Request:
    """One turn of the user: ``context`` is the text of the documents, empty without any."""

    context: str
    question: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What was asked and what the model answered."""

    request: Request
    answer: str


def make_request(question: str, documents: Sequence[Document] = ()) -> Request:
    """Join the documents. Raises InputError when the question is empty."""
    if not question.strip():
        raise InputError("the question is empty", hint="ask something")
    texts = [document.text.strip() for document in documents]
    if len(documents) > 1:  # names help only to tell several apart
        texts = [f"Document {document.name}:\n\n{text}" for document, text in zip(documents, texts, strict=True)]
    return Request("\n\n".join(texts), question.strip())


def has_template(tokenizer: Any) -> bool:
    """Whether the model was trained to chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, turns: Sequence[Turn], request: Request) -> str:
    """The conversation so far and the new request, up to where the model answers."""
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
    """Token ids of ``text``; ``first`` when it begins the context. A chat template brings its own special tokens."""
    special = first and not has_template(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _message(request: Request) -> str:
    return f"{request.context}\n\n{request.question}" if request.context else request.question


def _plain(request: Request) -> str:
    head = f"{request.context}\n\n" if request.context else ""
    return f"{head}Question: {request.question}\nAnswer:"
