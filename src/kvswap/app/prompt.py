"""The text of a conversation: documents first, question last, in the model's chat template or in a plain form.

Pure, apart from the tokenizer that is passed in.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvswap.app.documents import Document, Span
from kvswap.errors import DamagedError, InputError, ModelError
from kvswap.models import tokens
from kvswap.models.chat_template import apply_template, has_template

PIECE_CHARACTERS = 1 << 14
"""So much text is tokenized at a time while its length is checked."""
MOST_MARKS = 255
"""So many ends of earlier prompts and answers are remembered."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    ``role`` is "system", "user", "assistant", "tool" or another one that the template knows. ``context`` is the text of
    the documents that come before ``content``, empty without any. ``extra`` are further keys for the template (JSON),
    such as ``tool_calls``. ``documents`` says where the documents are in ``context``.
    """

    role: str
    content: str
    context: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    documents: tuple[Span, ...] = ()

    @property
    def text(self) -> str:
        """Documents and content, as the template gets them."""
        return f"{self.context}\n\n{self.content}" if self.context else self.content


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages, the text that the template made of them, and its token ids.

    ``continues`` says whether text and ids go on from the conversation before, up to its end. ``raw`` marks a prompt
    that is no conversation: text to be continued as it is.
    """

    messages: list[Message]
    text: str
    ids: list[int]
    continues: bool
    raw: bool = False


def make_request(question: str, documents: Sequence[Document] = ()) -> Message:
    """Join the documents. Raises InputError when the question is empty, or a text cannot be encoded in UTF-8."""
    if not question.strip():
        raise InputError("the question is empty", hint="ask something")
    for what, text in (("the question", question), *((f"document {each.name}", each.text) for each in documents)):
        check_encodable(what, text)
    context, spans = "", []
    for document in documents:
        if len(documents) > 1:  # a name is of use only where there are several documents
            context += f"Document {document.name}:\n\n"
        spans.append(Span.of(document, len(context)))
        context += document.text.strip() + "\n\n"
    return Message("user", question.strip(), context[:-2], documents=tuple(spans))


def read_messages(given: Sequence[Message | Mapping[str, Any]]) -> list[Message]:
    """Messages from mappings as a chat template has them. Raises InputError where one cannot be used."""
    messages = []
    for number, each in enumerate(given):
        if not isinstance(each, Message):
            rest = {key: value for key, value in each.items() if key not in ("role", "content")}
            each = Message(each.get("role", ""), each.get("content") or "", "", rest)
        if not isinstance(each.role, str) or not each.role or not isinstance(each.content, str):
            raise InputError(f"message {number}: its role or its content is no text", hint="give both as text")
        _each_text([each.role, each.content, each.context, each.extra], partial(check_encodable, f"message {number}"))
        messages.append(each)
    if not messages:
        raise InputError("there are no messages", hint="give at least one")
    return messages


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages under these instructions, in place of earlier ones; None leaves those. Raises InputError."""
    if system is None:
        return list(messages)
    check_encodable("the system text", system)
    rest = messages[1:] if messages and messages[0].role == "system" else messages
    return [Message("system", system.strip()), *rest]


def check_encodable(what: str, text: str) -> None:
    """Raise InputError for lone surrogates: what Python makes of bytes that are not UTF-8, and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not UTF-8 text (character {error.start:,})", hint="write it in UTF-8") from error


def check_length(tokenizer: Any, messages: Sequence[Message], limit: int | None) -> None:
    """Refuse messages that are far too long for a model, before all of them are tokenized.

    A text of at most eight characters for each token of ``limit`` is short enough to be tokenized whole. A longer one
    is counted in pieces, and counting stops at twice ``limit`` tokens. A cut between two pieces can change a few tokens
    around it, so messages that are only a little too long pass: ``Conversation.prompt`` gives its exact length.
    Without a limit nothing is checked. Raises InputError.
    """
    texts = [text for message in messages for text in (message.context, message.content)]
    if limit is None or sum(map(len, texts)) <= 8 * limit:
        return
    count = 0
    for text in texts:
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


def render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> str:
    """The text of the messages, up to where the model answers, for ``encode``.

    Special tokens come from the template alone: what looks like one in a message or a tool is escaped. Where the
    template refuses a system message, its text begins the first message of the user. Raises ModelError where the
    template fails.
    """

    def plain(value: Any) -> Any:
        return _each_text(value, lambda text: tokens.escape(tokenizer, text))

    if not has_template(tokenizer):
        return str(plain("".join(map(_plain, messages)) + ("Answer:" if _asks(messages) else "")))
    given = [{"role": each.role, "content": plain(each.text), **plain(each.extra)} for each in messages]
    try:
        return apply_template(tokenizer, given, tools=plain(tools) if tools else None)
    except ModelError:
        merged = _without_system(given)
        if merged is None:
            raise
        return apply_template(tokenizer, merged, tools=plain(tools) if tools else None)


def encode(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Token ids of ``text``; ``first`` where it begins the context. A chat template has its own special tokens."""
    return tokens.encode(tokenizer, text, first=first, special=not has_template(tokenizer))


@dataclass(slots=True)
class Conversation:
    """The messages so far, the text that the template made of them, and the token ids of that text.

    ``marks`` are the places where a prompt or an answer ends: so many characters of ``text`` are so many of ``ids``. A
    tokenizer would not always make the same ids of that text, so a prompt takes over the ids up to the last mark that
    it shares.
    """

    messages: list[Message] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)

    def prompt(
        self, tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> Prompt:
        """The prompt of these messages, which need not go on from those before."""
        text = render(tokenizer, messages, tools)
        ids, continues = self._encode(tokenizer, text, raw=False)
        return Prompt(list(messages), text, ids, continues)

    def raw_prompt(self, tokenizer: Any, given: str | list[int]) -> Prompt:
        """A prompt of text or token ids as they are, without a template; special tokens are what they spell."""
        if not isinstance(given, str):
            text = tokens.decode(tokenizer, given, special=True)
            return Prompt([], text, given, bool(self.ids) and given[: len(self.ids)] == self.ids, raw=True)
        text = given
        ids, continues = self._encode(tokenizer, text, raw=True)
        return Prompt([], text, ids, continues, raw=True)

    def add(self, tokenizer: Any, prompt: Prompt, answer_ids: list[int], answer: str | None = None) -> None:
        """Take over a prompt and the token ids of its answer; ``answer`` is its text where not all of it was wanted."""
        if not prompt.raw:
            answer = tokens.decode(tokenizer, answer_ids, special=False) if answer is None else answer
            self.messages = [*prompt.messages, Message("assistant", answer)]
        else:
            self.messages = []
        shared = self._shared_marks(prompt.text)
        kept = shared if shared and prompt.ids[: shared[-1][1]] == self.ids[: shared[-1][1]] else []
        self.ids = prompt.ids + answer_ids
        self.text = prompt.text + _escaped_answer(tokenizer, answer_ids, raw=prompt.raw)
        ends = [(len(prompt.text), len(prompt.ids)), (len(self.text), len(self.ids))]
        self.marks = [*(mark for mark in kept[-MOST_MARKS:] if mark[0] < ends[0][0]), *ends]

    @property
    def last_prompt_tokens(self) -> int:
        """Token ids up to the last answer."""
        return self.marks[-2][1] if len(self.marks) > 1 else 0

    def to_json(self) -> bytes:
        """Messages, text and marks, and the number of token ids; the ids themselves are stored elsewhere."""
        messages = [[each.role, each.content, each.context, each.extra] for each in self.messages]
        found = {"messages": messages, "text": self.text, "tokens": len(self.ids), "marks": self.marks}
        spans = [[dataclasses.astuple(span) for span in each.documents] for each in self.messages]
        if any(spans):
            found["documents"] = spans
        return json.dumps(found, ensure_ascii=False).encode()

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
            (text,), count = _texts([found["text"]]), int(found["tokens"])
            if not 0 <= count <= len(ids):
                raise ValueError(f"{count} tokens")
            messages = _messages_of_turns(found["turns"]) if "turns" in found else _messages(found["messages"])
            messages = _with_documents(messages, found.get("documents", []))
            marks = [(int(characters), int(at)) for characters, at in found.get("marks", [[len(text), count]])]
            if any(not (0 <= characters <= len(text) and 0 <= at <= count) for characters, at in marks):
                raise ValueError("marks beyond the text")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise DamagedError(f"{label}: its conversation is malformed", hint="try: kvswap sessions repair") from error
        return cls(messages, text, ids[:count], marks)

    def _encode(self, tokenizer: Any, text: str, *, raw: bool) -> tuple[list[int], bool]:
        """Token ids of a text, and whether it goes on from the whole conversation."""
        if self.ids and not self.marks:  # ids of somebody else, without a text
            return self.ids + encode(tokenizer, text, first=False), True
        shared = self._shared_marks(text)
        if not shared:
            ids = (
                tokens.encode(tokenizer, text, first=True, special=True) if raw else encode(tokenizer, text, first=True)
            )
            return ids, False
        characters, count = shared[-1]
        return self.ids[:count] + encode(tokenizer, text[characters:], first=False), count == len(self.ids)

    def _shared_marks(self, text: str) -> list[tuple[int, int]]:
        return [mark for mark in self.marks if mark[0] and text.startswith(self.text[: mark[0]])]


def _escaped_answer(tokenizer: Any, ids: Sequence[int], *, raw: bool = False) -> str:
    """The text of an answer as ``render`` would have it: special tokens as they are, the text between them escaped."""
    if raw:
        return tokens.decode(tokenizer, list(ids), special=True)
    control = tokens.special_tokens(tokenizer)
    text = ""
    for special, run in itertools.groupby(ids, control.__contains__):
        found = tokens.decode(tokenizer, list(run), special=True)
        text += found if special else tokens.escape(tokenizer, found)
    return text


def _messages(found: Sequence[Any]) -> list[Message]:
    """Messages from the JSON of ``to_json``. Raises ValueError, TypeError."""
    messages = []
    for each in found:
        role, content, context, extra = each
        if not isinstance(extra, dict):
            raise TypeError("not an object")
        role, content, context = _texts([role, content, context])
        messages.append(Message(role, content, context, extra))
    return messages


def _with_documents(messages: list[Message], spans: Sequence[Any]) -> list[Message]:
    """Messages that know where their documents are, as ``to_json`` has it. Raises ValueError, TypeError."""
    if not spans:
        return messages
    found = []
    for message, given in zip(messages, spans, strict=True):
        documents = []
        for name, start, stop, pages, first_line in given:
            (name,), numbers = _texts([name]), [int(each) for each in (start, stop, first_line, *pages)]
            if not 0 <= numbers[0] <= numbers[1] <= len(message.context) or min(numbers) < 0:
                raise ValueError("documents beyond the text")
            documents.append(Span(name, numbers[0], numbers[1], tuple(numbers[3:]), numbers[2]))
        found.append(dataclasses.replace(message, documents=tuple(documents)))
    return found


def _messages_of_turns(found: Sequence[Any]) -> list[Message]:
    """Messages of a conversation as version 0.1 wrote it: documents, question and answer of each turn."""
    messages = []
    for turn in found:
        context, question, answer = _texts(turn)
        messages += [Message("user", question, context), Message("assistant", answer)]
    return messages


def _texts(values: Sequence[object]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("not text")
    return [str(value) for value in values]


def _plain(message: Message) -> str:
    """A message for a model without a template."""
    if message.role == "user":
        head = f"{message.context}\n\n" if message.context else ""
        return f"{head}Question: {message.content}\n"
    return f"Answer:{message.content}\n\n" if message.role == "assistant" else f"{message.text}\n\n"


def _asks(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[-1].role != "assistant"


def _each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """``value`` (JSON) with every text in it changed, names of keys apart."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_each_text(each, change) for each in value]
    if isinstance(value, dict):
        return {key: _each_text(each, change) for key, each in value.items()}
    return value


def _without_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with the text of a leading system message in the first one of the user; None where there is none."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]
