"""The fields of requests: which are known, what they may contain, and which are refused by name.

Unknown fields are ignored, as clients of many servers send them. Fields that change the answer and are not supported
are refused. Bodies are decoded and checked by msgspec. Pure.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from kvswap.models.sampling import Sampling
from kvswap.serve.api_errors import ApiError

MOST_STOPS = 16
Body = TypeVar("Body")
Text = str | list[dict[str, Any]] | None


class StreamOptions(msgspec.Struct, kw_only=True):
    """``stream_options``."""

    include_usage: bool | None = False


class Sampled(msgspec.Struct, kw_only=True):
    """What all endpoints that generate have in common. None is as if a field were absent."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    store: bool | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a chat."""

    role: str
    content: Text = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(Sampled, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None


class CompletionRequest(Sampled, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class ResponseRequest(Sampled, kw_only=True):
    """The body of /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    tools: list[dict[str, Any]] | None = None
    text: dict[str, Any] | None = None
    top_logprobs: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of /tokenize: text, or the messages of a chat."""

    content: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


def read_body(body: bytes, kind: type[Body]) -> Body:
    """The body as ``kind``. Raises ApiError, with the path of the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        path = str(error).partition(" - at `$")[2]
        raise ApiError(400, str(error), param=path.strip(".`") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error


def refuse_unsupported(request: Sampled) -> None:
    """Raise ApiError for the first field that asks for something this server does not do."""
    wanted = {
        "n": request.n not in (None, 1),
        "frequency_penalty": bool(request.frequency_penalty),
        "presence_penalty": bool(request.presence_penalty),
        "logit_bias": bool(request.logit_bias),
    }
    if isinstance(request, ChatRequest):
        kind = (request.response_format or {}).get("type", "text")
        wanted |= {
            "modalities": request.modalities not in (None, [], ["text"]),
            "response_format": kind != "text",
            "tool_choice": request.tool_choice not in (None, "auto", "none"),
        }
        wanted |= {
            name: bool(getattr(request, name)) for name in ("audio", "functions", "prediction", "web_search_options")
        }
    elif isinstance(request, CompletionRequest):
        wanted |= {"best_of": request.best_of not in (None, 1), "suffix": bool(request.suffix)}
    elif isinstance(request, ResponseRequest):
        form = (request.text or {}).get("format") or {}
        kind = form.get("type", "text") if isinstance(form, dict) else form
        wanted |= {"text.format": kind != "text"}
        names = ("previous_response_id", "conversation", "background", "tools", "top_logprobs")
        wanted |= {name: bool(getattr(request, name)) for name in names}
    for name, asked in wanted.items():
        if asked:
            raise ApiError(400, f"{name} is not supported here in this form; leave it out", param=name)


def at_least_one(max_tokens: int) -> int:
    """The longest answer that a request asks for. Raises ApiError for none."""
    if max_tokens < 1:
        raise ApiError(400, f"max_tokens: got {max_tokens}; use 1 or more", param="max_tokens")
    return max_tokens


def sampling_of(request: Sampled, max_new_tokens: int) -> dict[str, Any]:
    """The arguments of ``Sampling``; what is absent is left to its defaults. Raises ApiError, ConfigError.

    ``max_new_tokens`` may be 0, for a prompt that is only scored.
    """
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MOST_STOPS:
        raise ApiError(400, f"stop has {len(stop)} strings; at most {MOST_STOPS} are allowed", param="stop")
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    if given["top_k"] == -1:  # as some servers write "all"
        given["top_k"] = 0
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    found["stop"] = tuple(each for each in stop if each)
    Sampling(**found, max_new_tokens=max_new_tokens or 1)
    return {**found, "max_new_tokens": max_new_tokens}
