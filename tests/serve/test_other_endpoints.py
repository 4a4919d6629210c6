"""Text completions, responses, models, tokenize, metrics and health, with the real client."""

from __future__ import annotations

import math

import pytest
import torch
from openai import BadRequestError, NotFoundError

from tests.serve.conftest import STORY, Running, user


def test_text_goes_on_whole_and_streamed(served: Running) -> None:
    given = {"model": "tiny", "prompt": STORY, "max_tokens": 10}
    found = served.openai.completions.create(**given)
    assert (
        len(found.choices) == 1 and found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 10
    )
    chunks = list(served.openai.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == found.choices[0].text
    used = chunks[-1].usage
    assert used.prompt_tokens - used.prompt_tokens_details.cached_tokens <= 8
    again = served.openai.completions.create(**{**given, "prompt": STORY + found.choices[0].text + " And"})
    assert again.usage.prompt_tokens_details.cached_tokens >= used.prompt_tokens - 8


def test_several_prompts_and_token_ids(served: Running) -> None:
    ids = served.http.post("/tokenize", json={"content": "Once upon"}).json()["tokens"]
    found = served.openai.completions.create(model="tiny", prompt=["Once upon", "a time"], max_tokens=5)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage.completion_tokens == 10
    (alone,) = served.openai.completions.create(model="tiny", prompt=[ids], max_tokens=5).choices
    assert alone.text == found.choices[0].text


def test_stored_tokens_of_all_prompts_are_counted(served: Running) -> None:
    def cached(*prompts: str) -> int:
        found = served.openai.completions.create(model="tiny", prompt=list(prompts), max_tokens=2)
        return found.usage.prompt_tokens_details.cached_tokens

    assert cached(STORY) == 0
    alone = cached(STORY)
    assert alone > 0 and cached(STORY, "Once upon") >= alone


def test_echo_gives_the_log_probabilities_of_the_prompt(served: Running, loaded) -> None:
    text = "Who counts in place 7?"
    given = {"model": "tiny", "prompt": text, "max_tokens": 1, "echo": True, "logprobs": 2}
    found = served.openai.completions.create(**given).choices[0]
    ids = served.http.post("/tokenize", json={"content": text}).json()["tokens"]
    served.stop()
    with torch.no_grad():
        rows = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0].float(), dim=-1)
    expected = [float(rows[place, token]) for place, token in enumerate(ids[1:])]
    given_back = found.logprobs.token_logprobs
    assert given_back[0] is None and given_back[1:-1] == pytest.approx(expected, abs=2e-3)
    assert len(given_back) == len(ids) + 1 == len(found.logprobs.tokens) == len(found.logprobs.top_logprobs)
    assert math.isclose(max(found.logprobs.top_logprobs[3].values()), float(rows[2].max()), abs_tol=2e-3)
    assert found.text.startswith(text) and served.sessions() == []


def test_scoring_alone(served: Running) -> None:
    given = {"model": "tiny", "prompt": "Who?", "max_tokens": 0, "echo": True, "logprobs": 1}
    found = served.openai.completions.create(**given).choices[0]
    assert found.text == "Who?" and len(found.logprobs.tokens) == 4
    with pytest.raises(BadRequestError, match="echo"):
        served.openai.completions.create(model="tiny", prompt="Who?", max_tokens=0)


@pytest.mark.parametrize("prompt", [{"a": 1}, [1, "a"], [[1], "a", 5], [True], [10**9], [-1], [], "", ["a"] * 100])
def test_wrong_prompts_are_refused(served: Running, prompt) -> None:
    assert served.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).status_code == 400


def test_responses(served: Running) -> None:
    chat = served.openai.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, user("Who?")], max_tokens=8
    )
    given = {"model": "tiny", "instructions": "Be brief.", "input": "Who?", "max_output_tokens": 8}
    found = served.openai.responses.create(**given)
    assert found.output_text == chat.choices[0].message.content and found.status == "incomplete"
    assert found.usage.output_tokens == 8 and found.usage.input_tokens == chat.usage.prompt_tokens
    events = list(served.openai.responses.create(**given, stream=True))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == found.output_text
    stop = found.output_text[4:6]
    with served.openai.responses.stream(**given, extra_body={"stop": stop}) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == found.output_text[: found.output_text.index(stop)]
    parts = [{"type": "input_text", "text": "Who?"}]
    listed = served.openai.responses.create(
        model="tiny", instructions="Be brief.", input=[{"role": "user", "content": parts}], max_output_tokens=8
    )
    assert listed.output_text == found.output_text
    for wrong in ({"previous_response_id": "x"}, {"input": []}, {"tools": [{"type": "web_search"}]}):
        with pytest.raises(BadRequestError):
            served.openai.responses.create(**{**given, **wrong})


def test_models(served: Running) -> None:
    (model,) = served.openai.models.list().data
    assert model.id == "tiny" and model.context_length == 8192
    assert served.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(NotFoundError):
        served.openai.models.retrieve("other/model")


def test_tokenize(served: Running) -> None:
    found = served.http.post("/tokenize", json={"messages": [user("Who?")]}).json()
    used = served.openai.chat.completions.create(model="tiny", messages=[user("Who?")], max_tokens=1).usage
    assert found["count"] == len(found["tokens"]) == used.prompt_tokens
    assert served.http.post("/tokenize", json={"content": ""}).json()["tokens"] == []
    assert served.http.post("/tokenize", json={}).status_code == 400


def test_metrics_count(served: Running) -> None:
    served.openai.chat.completions.create(model="tiny", messages=[user("Who?")], max_tokens=3)
    served.http.post("/v1/chat/completions", json={})
    served.idle()  # an answer has arrived a moment before its job is over
    text = served.http.get("/metrics").text
    assert 'kvswap_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'kvswap_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
    assert "kvswap_generated_tokens_total 3.0" in text and "kvswap_first_token_seconds_count 1.0" in text
    assert "kvswap_running_requests 0.0" in text
