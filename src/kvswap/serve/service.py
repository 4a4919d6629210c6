"""What the endpoints share: the model's facts, prompts as token ids, and answers as they arrive.

Everything here runs in the event loop. Tokenizing runs in a thread of the loop's pool, one text at a time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from kvswap.app.prompt import Conversation, Message, check_encodable, check_length, read_messages
from kvswap.app.stats import RunStats
from kvswap.errors import InputError
from kvswap.models.logprobs import TokenLogprob
from kvswap.serve.answers import Answers
from kvswap.serve.api_errors import TOO_LONG, ApiError, as_api_error, too_long
from kvswap.serve.jobs import Done, Echo, Event, Failed, Job, Piece, Progress, Question, Worker
from kvswap.serve.metrics import Metrics

KEEP_ALIVE_S = 5.0
KEEP_ALIVE, DONE = b": keep-alive\n\n", b"data: [DONE]\n\n"


class ClientLeft(Exception):  # noqa: N818 - not an error
    """Nobody waits for the answer any more."""


@dataclass(slots=True, kw_only=True)
class Service:
    """One served model.

    ``check_ids`` refuses token ids that it does not have (InputError). ``limit_tokens`` is its context,
    ``max_new_tokens`` what an answer may have by default. ``answers`` belongs to the worker's thread.
    """

    tokenizer: Any
    check_ids: Callable[[list[int]], list[int]]
    name: str
    limit_tokens: int | None
    max_new_tokens: int
    worker: Worker
    answers: Answers
    kv_dir: str | None
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    _tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def chat_ids(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Token ids of a chat. Raises ApiError, KVSwapError."""

        def ids() -> list[int]:
            self._check_length(read_messages(messages))
            return Conversation().prompt(self.tokenizer, messages, tools).ids

        return self._checked(await self._in_thread(ids))

    async def text_ids(self, text: str | list[int]) -> list[int]:
        """Token ids of a text without a template. Raises ApiError, KVSwapError."""

        def ids() -> list[int]:
            if isinstance(text, str):
                check_encodable("the text", text)
                self._check_length([Message("user", text)])
            known = text if isinstance(text, str) else self.check_ids(text)
            return Conversation().raw_prompt(self.tokenizer, known).ids

        return self._checked(await self._in_thread(ids))

    def token_text(self, token_id: int) -> str:
        """A token as text; half of a character is a replacement character."""
        return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def prompt_text(self, question: Question) -> str:
        """The text of a raw prompt."""
        text = question.text
        return text if isinstance(text, str) else str(self.tokenizer.decode(text, clean_up_tokenization_spaces=False))

    def submit(self, question: Question) -> Job:
        """Queue a question. Raises ApiError."""
        return self.worker.submit(question)

    async def _in_thread(self, ids: Callable[[], list[int]]) -> list[int]:
        async with self._tokenizing:
            return await anyio.to_thread.run_sync(ids)

    def _check_length(self, messages: list[Message]) -> None:
        try:
            check_length(self.tokenizer, messages, self.limit_tokens)
        except InputError as error:
            raise ApiError(400, str(error), param="messages", code=TOO_LONG) from error

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ApiError(400, "the prompt is empty")
        if self.limit_tokens is not None and len(ids) > self.limit_tokens:
            raise too_long(len(ids), self.limit_tokens)
        return ids


# ---- answers


@dataclass(slots=True)
class Answer:
    """A complete answer; without ``stats`` where only a prompt was scored."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    echo: list[TokenLogprob | None] = field(default_factory=list)
    stats: RunStats | None = None

    def take(self, event: Event) -> bool:
        """Add an event; whether it was the last. Raises what failed."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Piece):
            self.text += event.text
            self.logprobs += event.logprobs
        elif isinstance(event, Echo):
            self.echo = event.logprobs
        elif isinstance(event, Done):
            self.stats = event.stats
        return isinstance(event, Done)


async def collect(service: Service, request: Request, job: Job) -> Answer:
    """Wait for a whole answer. Raises ClientLeft where the client does not wait for it, and what failed."""
    answer = Answer()
    watching = asyncio.create_task(_watch(request.receive, job))
    try:
        while not answer.take(await job.events.get()):
            pass
    finally:
        watching.cancel()
        service.worker.withdraw(job)
    if answer.stats is not None:
        service.metrics.answered(answer.stats)
    return answer


async def _watch(receive: Receive, job: Job) -> None:
    """Have the reader of a job's events stop when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()
    job.events.put_nowait(Failed(ClientLeft()))


class EventStream:
    """A response of server-sent events. ``chunks`` gives them; ``job`` ends with the response, however that ends."""

    def __init__(self, service: Service, job: Job, chunks: AsyncIterator[bytes]) -> None:
        self._service, self._job, self._chunks = service, job, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        watching = asyncio.create_task(_watch(receive, self._job))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            pass
        finally:
            watching.cancel()
            self._service.worker.withdraw(self._job)


async def events(service: Service, job: Job) -> AsyncIterator[Event | None]:
    """Events of a job up to the last; None where nothing came for so long that the connection has to be kept alive."""
    while True:
        try:
            event: Event | None = await asyncio.wait_for(job.events.get(), KEEP_ALIVE_S)
        except TimeoutError:
            event = None
        if isinstance(event, Failed) and isinstance(event.error, ClientLeft):
            raise event.error
        if isinstance(event, Done) and event.stats is not None:
            service.metrics.answered(event.stats)
        yield event
        if isinstance(event, Done | Failed):
            return


def sse(value: dict[str, Any], event: str = "") -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def failure(event: Failed) -> dict[str, Any]:
    """The error object that ends a stream."""
    return as_api_error(event.error).body()


def progress(event: Progress) -> dict[str, int]:
    """How much of a prompt is read, in a field that other clients ignore."""
    return {"processed": event.processed, "total": event.total}


def usage(stats: RunStats | None) -> dict[str, Any]:
    """``usage`` of chat and text completions."""
    if stats is None:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.stored_tokens},
    }


def finish_reason(stats: RunStats | None) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if stats is None or stats.finish_reason == "length" else "stop"
