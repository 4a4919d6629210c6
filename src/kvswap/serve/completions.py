"""/v1/completions: text that is continued as it is, several at a time, and the log-probabilities of a prompt."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from kvswap.models.logprobs import TokenLogprob
from kvswap.serve.api_errors import ApiError
from kvswap.serve.fields import CompletionRequest, read_body, refuse_unsupported, sampling_of
from kvswap.serve.jobs import Done, Failed, Job, Piece, Progress, Question
from kvswap.serve.service import (
    DONE,
    KEEP_ALIVE,
    Answer,
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

DEFAULT_TOKENS = 16
MOST_PROMPTS, MOST_LOGPROBS = 64, 20


async def completions(service: Service, request: Request) -> JSONResponse | EventStream:
    """Continue one text or several. Raises ApiError, KVSwapError."""
    given = read_body(await request.body(), CompletionRequest)
    refuse_unsupported(given)
    questions = [await _question(service, given, prompt) for prompt in _prompts(given.prompt)]
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": service.name}  # type: ignore[dict-item]
    if given.stream:
        if len(questions) > 1 or given.echo:
            raise ApiError(400, "stream with several prompts or with echo is not supported", param="stream")
        include_usage = bool(given.stream_options and given.stream_options.include_usage)
        job = service.submit(questions[0])
        return EventStream(service, job, _chunks(service, job, head, include_usage))
    choices, total, cached = [], {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, 0
    for number, question in enumerate(questions):
        answer = await collect(service, request, service.submit(question))
        choices.append(_choice(service, question, answer, number))
        used = usage(answer.stats)
        total = {name: count + used[name] for name, count in total.items()}
        cached += used.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return JSONResponse({**head, "choices": choices, "usage": {**total, **details}})


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a request: a text, token ids, or a list of either. Raises ApiError."""
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    if len(several) > MOST_PROMPTS:
        raise ApiError(400, f"{len(several)} prompts; at most {MOST_PROMPTS} are allowed", param="prompt")
    for each in several:
        ids = isinstance(each, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in each)
        if not (isinstance(each, str) or ids):
            raise ApiError(400, "prompt has to be text, token ids, or a list of either", param="prompt")
    return list(several)


async def _question(service: Service, given: CompletionRequest, prompt: str | list[int]) -> Question:
    top, wanted = given.logprobs, DEFAULT_TOKENS if given.max_tokens is None else given.max_tokens
    if top is not None and not 0 <= top <= MOST_LOGPROBS:
        raise ApiError(400, f"logprobs: got {top}; use 0 to {MOST_LOGPROBS}", param="logprobs")
    if wanted == 0 and not given.echo:
        raise ApiError(400, "max_tokens: 0 is of use with echo alone", param="max_tokens")
    return Question(
        ids=await service.text_ids(prompt),
        sampling=sampling_of(given, wanted),
        text=prompt,
        top_logprobs=top,
        store=given.store is not False and not given.echo,
        echo=bool(given.echo),
    )


def _choice(service: Service, question: Question, answer: Answer, number: int) -> dict[str, Any]:
    prompt = service.prompt_text(question) if question.echo else ""
    found = [*answer.echo, *answer.logprobs]
    reason = finish_reason(answer.stats)
    logprobs = None if question.top_logprobs is None else _logprobs(service, question.ids, found)
    return {"index": number, "text": prompt + answer.text, "finish_reason": reason, "logprobs": logprobs}


async def _chunks(service: Service, job: Job, head: dict[str, Any], include_usage: bool) -> AsyncIterator[bytes]:
    def chunk(text: str, reason: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return sse({**head, "choices": [choice], **more})

    async for event in events(service, job):
        if event is None:
            yield KEEP_ALIVE
        elif isinstance(event, Progress):
            yield chunk("", prompt_progress=progress(event))
        elif isinstance(event, Failed):
            yield sse(failure(event))
        elif isinstance(event, Piece) and (event.text or event.logprobs):
            wanted = job.question.top_logprobs is not None
            yield chunk(event.text, logprobs=_logprobs(service, [], event.logprobs) if wanted else None)
        elif isinstance(event, Done):
            yield chunk("", finish_reason(event.stats))
            if include_usage:
                yield sse({**head, "choices": [], "usage": usage(event.stats)})
            yield DONE


def _logprobs(service: Service, first: Sequence[int], found: Sequence[TokenLogprob | None]) -> dict[str, Any]:
    """Log-probabilities in the shape of this endpoint; ``first[0]`` is the token where ``found`` has None."""
    texts = [service.token_text(first[0] if each is None else each.token_id) for each in found]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    tops = [None if each is None else {service.token_text(token): value for token, value in each.top} for each in found]
    return {
        "tokens": texts,
        "token_logprobs": [None if each is None else each.logprob for each in found],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
