"""/v1/chat/completions with the real client: answers, streams, options, log-probabilities, and what is refused."""

from __future__ import annotations

import pytest
from openai import BadRequestError

from kvswap.app.engine import load
from kvswap.config import Config
from tests.serve.conftest import STORY, Running, user

ASK = {"model": "tiny", "messages": [user("Who?")], "max_tokens": 12}


def test_answer_is_that_of_the_engine(served: Running, loaded, tmp_path) -> None:
    found = served.openai.chat.completions.create(**ASK)
    served.stop()  # the model takes one engine at a time
    with load(loaded, Config(kv_dir=str(tmp_path / "other"), kv_memory="16MiB")) as engine:
        text = "".join(engine.chat([user("Who?")], max_new_tokens=12))
    assert found.choices[0].message.content == text and found.choices[0].finish_reason == "length"
    assert found.object == "chat.completion" and found.model == "tiny" and found.id.startswith("chatcmpl-")
    assert found.usage.completion_tokens == 12 and found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_stream_is_the_same_text(served: Running) -> None:
    whole = served.openai.chat.completions.create(**ASK).choices[0].message.content
    chunks = list(served.openai.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 3


def test_progress_of_a_long_prompt_is_told(served: Running) -> None:
    stream = served.openai.chat.completions.create(model="tiny", messages=[user(STORY * 2)], max_tokens=2, stream=True)
    told = [chunk.prompt_progress for chunk in stream if getattr(chunk, "prompt_progress", None)]
    assert told[-1]["processed"] == told[-1]["total"] > 3000
    assert [each["processed"] for each in told] == sorted(each["processed"] for each in told)


def test_stop_seed_and_sampling(served: Running) -> None:
    def ask(**options: object) -> object:
        return served.openai.chat.completions.create(**{**ASK, "max_tokens": 30, **options}).choices[0]

    whole = ask().message.content
    found = ask(stop=["never there", whole[6:9]])
    assert found.message.content == whole[: whole.index(whole[6:9])] and found.finish_reason == "stop"
    warm = {"temperature": 1.5, "extra_body": {"top_k": 50, "min_p": 0.001}}
    assert ask(seed=7, **warm).message.content == ask(seed=7, **warm).message.content
    assert ask(seed=7, **warm).message.content != ask(seed=8, **warm).message.content
    assert ask(temperature=1.5, extra_body={"top_k": 1}).message.content == whole


def test_logprobs(served: Running) -> None:
    choice = served.openai.chat.completions.create(**ASK, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert len(content) == 12 and all(len(each.top_logprobs) == 2 for each in content)
    assert all(each.logprob == each.top_logprobs[0].logprob < 0 for each in content)
    stream = served.openai.chat.completions.create(**ASK, logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        each.logprob for chunk in stream if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([each.logprob for each in content], abs=1e-2)


def test_roles_and_parts_of_content(served: Running) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is there?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    same = [{"role": "system", "content": "Be brief."}, user("Who is there?")]
    found = [
        served.openai.chat.completions.create(model="x", messages=each, max_tokens=8).choices[0].message.content
        for each in (messages, same)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", 0.5),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["audio"]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 50),
        ("max_tokens", 0),
    ],
)
def test_what_is_not_supported_is_named(served: Running, field: str, value: object) -> None:
    with pytest.raises(BadRequestError) as error:
        served.openai.chat.completions.create(**{**ASK, field: value})
    assert error.value.param == field and field in error.value.message
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"seed": 2**70}, {"stop": ["x"] * 17}])
def test_values_out_of_range_are_refused_before_they_wait(served: Running, wrong, monkeypatch) -> None:
    monkeypatch.setattr(type(served.worker), "submit", None)
    with pytest.raises(BadRequestError, match=next(iter(wrong))):
        served.openai.chat.completions.create(**{**ASK, **wrong})


def test_unknown_fields_are_ignored(served: Running) -> None:
    body = {**ASK, "chat_id": "x", "mirostat": 0, "user": "me", "prompt_cache_key": "k", "n": 1, "logit_bias": {}}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200


def test_context_overflow_says_the_limit(served: Running) -> None:
    for text in ("x" * 9000, "x" * 4_000_000):
        with pytest.raises(BadRequestError, match="the model's limit is 8,192") as error:
            served.openai.chat.completions.create(model="tiny", messages=[user(text)])
        assert error.value.code == "context_length_exceeded"


def test_picture_is_refused_by_its_type(served: Running) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(BadRequestError, match="image_url"):
        served.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
