"""Messages of OpenAI's API as messages of a conversation, and tool calls in an answer. Pure, but for the tokenizer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from kvswap.app.prompt import Message
from kvswap.serve.api_errors import ApiError
from kvswap.serve.fields import ChatMessage, Text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_chat(given: Sequence[ChatMessage]) -> list[Message]:
    """The messages of a chat. Raises ApiError that names what cannot be used."""
    if not given:
        raise ApiError(400, "messages is empty; give at least one", param="messages")
    return [_message(each, f"messages[{number}]") for number, each in enumerate(given)]


def read_input(given: str | list[dict[str, Any]], instructions: str | None) -> list[Message]:
    """The messages of /v1/responses. Raises ApiError."""
    head = [] if instructions is None else [Message("system", instructions)]
    if isinstance(given, str):
        return [*head, Message("user", given)]
    messages = []
    for number, item in enumerate(given):
        where, kind = f"input[{number}]", item.get("type", "message")
        if kind != "message" or not isinstance(item.get("role"), str):
            raise ApiError(400, f"{where}: only messages with a role are supported", param=where)
        content = item.get("content")
        if not isinstance(content, str | list):
            raise ApiError(400, f"{where}.content has to be text or a list of parts", param=where)
        messages.append(Message(_role(item["role"], where), _text(content, where)))
    if not messages:
        raise ApiError(400, "input is empty", param="input")
    return [*head, *messages]


def parse_tool_calls(tokenizer: Any, text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer without its tool calls, and the calls as OpenAI's API has them.

    Only where the tokenizer says how its model writes calls (``response_template``); else the text stays as it is.
    """
    if not getattr(tokenizer, "response_template", None):
        return text, []
    try:
        found = tokenizer.parse_response(text)
        calls = [_call(each) for each in found.get("tool_calls") or []]
    except (ValueError, KeyError, TypeError, AttributeError):  # what the model wrote is no call
        return text, []
    return (str(found.get("content") or ""), calls) if calls else (text, [])


def _call(found: dict[str, Any]) -> dict[str, Any]:
    function = found.get("function", found)
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = str(function["name"])
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": {"name": name, "arguments": written}}


def _message(given: ChatMessage, where: str) -> Message:
    extra: dict[str, Any] = {}
    if given.tool_calls:
        extra["tool_calls"] = [_with_arguments(each, f"{where}.tool_calls") for each in given.tool_calls]
    for name in ("tool_call_id", "name"):
        if getattr(given, name) is not None:
            extra[name] = getattr(given, name)
    return Message(_role(given.role, where), _text(given.content, where), "", extra)


def _with_arguments(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates expect."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: a call needs a function with a name", param=where)
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where}: arguments are not JSON", param=where) from error
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _role(role: str, where: str) -> str:
    if role not in ROLES:
        raise ApiError(400, f"{where}.role: got {role[:40]!r}; use one of {', '.join(ROLES)}", param=where)
    return ROLES[role]


def _text(content: Text, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind, text = part.get("type") if isinstance(part, dict) else None, None
        if kind in _TEXT_PARTS:
            text = part.get("text")
        if not isinstance(text, str):
            raise ApiError(400, f"{where}.content: parts of type {str(kind)[:40]!r} are not supported", param=where)
        texts.append(text)
    return "".join(texts)
