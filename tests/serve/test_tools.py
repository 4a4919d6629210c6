"""Tools: they reach the chat template, and calls come back where the tokenizer says how its model writes them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from openai import BadRequestError

from kvswap.serve.api_errors import ApiError
from kvswap.serve.fields import ChatMessage
from kvswap.serve.messages import parse_tool_calls, read_chat, read_input
from tests.helpers.folders import CHAT_TEMPLATE
from tests.serve.conftest import Running, user

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = "{% if tools %}<s>tools: {{ tools | tojson }}</s>{% endif %}" + CHAT_TEMPLATE


def test_tools_reach_the_template_and_text_comes_back(served: Running, loaded, monkeypatch) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", WITH_TOOLS)
    given = {"model": "tiny", "messages": [user("Who?")], "max_tokens": 6}
    without = served.openai.chat.completions.create(**given)
    found = served.openai.chat.completions.create(**given, tools=TOOLS)
    assert found.usage.prompt_tokens > without.usage.prompt_tokens + 50
    assert found.choices[0].message.content and not found.choices[0].message.tool_calls
    none = served.openai.chat.completions.create(**given, tools=TOOLS, tool_choice="none")
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    chunks = list(served.openai.chat.completions.create(**given, tools=TOOLS, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content


def test_calls_come_back_as_the_tokenizer_reads_them(served: Running, loaded, monkeypatch) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
    monkeypatch.setattr(loaded.tokenizer, "response_template", {"any": "thing"}, raising=False)
    monkeypatch.setattr(loaded.tokenizer, "parse_response", lambda text: {"content": "", "tool_calls": [call]})
    given = {"model": "tiny", "messages": [user("Who?")], "max_tokens": 6, "tools": TOOLS}
    choice = served.openai.chat.completions.create(**given).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    function = choice.message.tool_calls[0].function
    assert (function.name, json.loads(function.arguments)) == ("weather", {"city": "Bern"})
    chunks = list(served.openai.chat.completions.create(**given, stream=True))
    (delta,) = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert delta.tool_calls[0].function.name == "weather" and chunks[-1].choices[0].finish_reason == "tool_calls"
    follow = [*given["messages"], choice.message.model_dump(exclude_none=True)]
    follow.append({"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"})
    assert served.openai.chat.completions.create(**{**given, "messages": follow}).choices


@pytest.mark.parametrize("found", [{"tool_calls": [{"no": "name"}]}, {"tool_calls": [5]}, {}, None])
def test_what_is_no_call_stays_text(found: object) -> None:
    tokenizer = SimpleNamespace(response_template={"any": "thing"}, parse_response=lambda text: found)
    assert parse_tool_calls(tokenizer, "the text") == ("the text", [])


@pytest.mark.parametrize("calls", [[{}], [{"function": {"name": 5}}], [{"function": {"name": "f", "arguments": "{"}}]])
def test_malformed_calls_in_messages_are_refused(calls: list[dict[str, object]]) -> None:
    with pytest.raises(ApiError, match="tool_calls"):
        read_chat([ChatMessage(role="assistant", tool_calls=calls)])


def test_items_that_are_no_messages_are_refused(served: Running) -> None:
    for wrong in ([{"type": "reasoning"}], [{"role": "user", "content": 5}], [{"role": "nobody", "content": "x"}]):
        with pytest.raises(ApiError, match=r"input\[0\]"):
            read_input(wrong, None)
    with pytest.raises(BadRequestError, match="role"):
        served.openai.chat.completions.create(model="tiny", messages=[{"role": "nobody", "content": "x"}])
