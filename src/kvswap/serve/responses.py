"""/v1/responses: text in and text out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from kvswap.app.stats import RunStats
from kvswap.serve.fields import ResponseRequest, at_least_one, read_body, refuse_unsupported, sampling_of
from kvswap.serve.jobs import Done, Failed, Job, Piece, Progress, Question
from kvswap.serve.messages import read_input
from kvswap.serve.service import KEEP_ALIVE, EventStream, Service, collect, events, failure, progress, sse


class _Response:
    """The objects of one response as it grows."""

    def __init__(self, model: str) -> None:
        self._head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "temperature": None,
            "tool_choice": "none",
            "tools": [],
            "top_p": None,
        }
        self.item_id = f"msg_{secrets.token_hex(12)}"

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    def item(self, text: str, status: str) -> dict[str, Any]:
        content = [self.part(text)] if status == "completed" else []
        return {"type": "message", "id": self.item_id, "role": "assistant", "status": status, "content": content}

    def begun(self) -> dict[str, Any]:
        return {**self._head, "status": "in_progress", "output": [], "usage": None}

    def failed(self, message: str) -> dict[str, Any]:
        error = {"code": "server_error", "message": message}
        return {**self._head, "status": "failed", "output": [], "usage": None, "error": error}

    def complete(self, text: str, stats: RunStats | None) -> dict[str, Any]:
        cut = stats is None or stats.finish_reason == "length"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self.item(text, "completed")],
            "usage": _usage(stats),
        }


async def responses(service: Service, request: Request) -> JSONResponse | EventStream:
    """Answer a request. Raises ApiError, KVSwapError."""
    given = read_body(await request.body(), ResponseRequest)
    refuse_unsupported(given)
    wanted = service.max_new_tokens if given.max_output_tokens is None else at_least_one(given.max_output_tokens)
    messages = read_input(given.input, given.instructions)
    question = Question(
        ids=await service.chat_ids(messages, None),
        sampling=sampling_of(given, wanted),
        messages=messages,
        store=given.store is not False,
    )
    job, response = service.submit(question), _Response(service.name)
    if given.stream:
        return EventStream(service, job, _events(service, job, response))
    answer = await collect(service, request, job)
    return JSONResponse(response.complete(answer.text, answer.stats))


async def _events(service: Service, job: Job, response: _Response) -> AsyncIterator[bytes]:
    number, text = -1, ""
    place = {"item_id": response.item_id, "output_index": 0, "content_index": 0}

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    yield event("response.created", response=response.begun())
    yield event("response.in_progress", response=response.begun())
    yield event("response.output_item.added", output_index=0, item=response.item("", "in_progress"))
    yield event("response.content_part.added", **place, part=response.part(""))
    async for each in events(service, job):
        if each is None:
            yield KEEP_ALIVE
        elif isinstance(each, Progress):
            yield event("response.in_progress", response={**response.begun(), "prompt_progress": progress(each)})
        elif isinstance(each, Piece) and each.text:
            text += each.text
            yield event("response.output_text.delta", **place, delta=each.text, logprobs=[])
        elif isinstance(each, Failed):
            yield event("response.failed", response=response.failed(failure(each)["error"]["message"]))
        elif isinstance(each, Done):
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=response.part(text))
            yield event("response.output_item.done", output_index=0, item=response.item(text, "completed"))
            complete = response.complete(text, each.stats)
            yield event(f"response.{complete['status']}", response=complete)


def _usage(stats: RunStats | None) -> dict[str, Any] | None:
    if stats is None:
        return None
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.stored_tokens},
        "output_tokens": stats.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
    }
