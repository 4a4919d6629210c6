"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from kvswap.app.stats import RunStats
from kvswap.models.logprobs import TokenLogprob
from kvswap.serve.api_errors import ApiError
from kvswap.serve.fields import ChatRequest, at_least_one, read_body, refuse_unsupported, sampling_of
from kvswap.serve.jobs import Done, Failed, Job, Piece, Progress, Question
from kvswap.serve.messages import parse_tool_calls, read_chat
from kvswap.serve.service import (
    DONE,
    KEEP_ALIVE,
    EventStream,
    Service,
    collect,
    events,
    failure,
    finish_reason,
    progress,
    sse,
    usage,
)

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class _Head:
    """What every chunk of one answer begins with."""

    id: str
    model: str
    created: int

    def object(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def chat_completions(service: Service, request: Request) -> JSONResponse | EventStream:
    """Answer a chat. Raises ApiError, KVSwapError."""
    given = read_body(await request.body(), ChatRequest)
    refuse_unsupported(given)
    question = await _question(service, given)
    head = _Head(f"chatcmpl-{secrets.token_hex(12)}", service.name, int(time.time()))
    job = service.submit(question)
    if given.stream:
        include_usage = bool(given.stream_options and given.stream_options.include_usage)
        return EventStream(service, job, _chunks(service, job, head, include_usage))
    answer = await collect(service, request, job)
    message, reason = _message(service, question, answer.text, answer.stats)
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    if question.top_logprobs is not None:
        choice["logprobs"] = _logprobs(service, answer.logprobs)
    return JSONResponse({**head.object("chat.completion"), "choices": [choice], "usage": usage(answer.stats)})


async def _question(service: Service, given: ChatRequest) -> Question:
    top = given.top_logprobs or 0
    if not 0 <= top <= MOST_TOP_LOGPROBS:
        raise ApiError(400, f"top_logprobs: got {top}; use 0 to {MOST_TOP_LOGPROBS}", param="top_logprobs")
    wanted = given.max_completion_tokens if given.max_completion_tokens is not None else given.max_tokens
    messages = read_chat(given.messages)
    tools = given.tools if given.tools and given.tool_choice != "none" else None
    return Question(
        ids=await service.chat_ids(messages, tools),
        sampling=sampling_of(given, service.max_new_tokens if wanted is None else at_least_one(wanted)),
        messages=messages,
        tools=tools,
        top_logprobs=top if given.logprobs else None,
        store=given.store is not False,
    )


async def _chunks(service: Service, job: Job, head: _Head, include_usage: bool) -> AsyncIterator[bytes]:
    question, held = job.question, ""
    yield _chunk(head, {"role": "assistant", "content": ""})
    async for event in events(service, job):
        if event is None:
            yield KEEP_ALIVE
        elif isinstance(event, Progress):
            yield _chunk(head, {}, prompt_progress=progress(event))
        elif isinstance(event, Failed):
            yield sse(failure(event))
        elif isinstance(event, Piece) and question.tools:  # a call is known at its end
            held += event.text
        elif isinstance(event, Piece) and (event.text or event.logprobs):
            found = None if question.top_logprobs is None else _logprobs(service, event.logprobs)
            yield _chunk(head, {"content": event.text}, logprobs=found)
        elif isinstance(event, Done):
            for last in _last_chunks(service, question, head, held, event.stats):
                yield last
            if include_usage:
                yield sse({**head.object("chat.completion.chunk"), "choices": [], "usage": usage(event.stats)})
            yield DONE


def _last_chunks(
    service: Service, question: Question, head: _Head, held: str, stats: RunStats | None
) -> Iterator[bytes]:
    reason = finish_reason(stats)
    if question.tools:
        message, reason = _message(service, question, held, stats)
        calls = [{"index": number, **call} for number, call in enumerate(message.get("tool_calls", []))]
        yield _chunk(head, {"content": message["content"], **({"tool_calls": calls} if calls else {})})
    yield _chunk(head, {}, finish_reason=reason)


def _chunk(
    head: _Head,
    delta: dict[str, Any],
    *,
    finish_reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
    **more: Any,
) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
    return sse({**head.object("chat.completion.chunk"), "choices": [choice], **more})


def _message(service: Service, question: Question, text: str, stats: RunStats | None) -> tuple[dict[str, Any], str]:
    """The message of the assistant, and why it ended."""
    calls: list[dict[str, Any]] = []
    if question.tools:
        text, calls = parse_tool_calls(service.tokenizer, text)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if not calls:
        return message, finish_reason(stats)
    return {**message, "content": text or None, "tool_calls": calls}, "tool_calls"


def _logprobs(service: Service, found: list[TokenLogprob]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = service.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]} for each in found
    ]
    return {"content": content, "refusal": None}
