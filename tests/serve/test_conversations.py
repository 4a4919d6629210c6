"""Conversations on disk: found by their tokens, continued in place, forked where they differ, kept over a restart."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import httpx
import pytest

from kvswap.errors import DiskReadError
from kvswap.sessions.catalog import entries, open_store, remove
from tests.serve.conftest import STORY, Running, assistant, user

BOOK = [user(STORY + "Who counts?")]


def ask(served: Running, messages: list[dict[str, str]], **options: Any) -> tuple[str, int, int]:
    """An answer, the tokens of its prompt, and how many of them were stored."""
    given: Any = {"max_tokens": 8, **options}
    found = served.openai.chat.completions.create(model="tiny", messages=messages, **given)
    used = found.usage
    return found.choices[0].message.content, used.prompt_tokens, used.prompt_tokens_details.cached_tokens


def test_next_turn_computes_what_is_new(served: Running) -> None:
    answer, first, cached = ask(served, BOOK)
    assert cached == 0
    messages = [*BOOK, assistant(answer), user("And?")]
    answer, second, cached = ask(served, messages)
    assert cached >= first and second - cached < 40
    messages += [assistant(answer), user("Why?")]
    _, third, cached = ask(served, messages)
    assert cached >= second and third - cached < 40
    assert len(served.sessions()) == 1


def test_conversation_goes_on_after_a_restart(start) -> None:
    served = start()
    answer, first, _ = ask(served, BOOK)
    served.stop()
    served = start()
    _, second, cached = ask(served, [*BOOK, assistant(answer), user("And?")])
    assert cached >= first and second - cached < 40 and len(served.sessions()) == 1


def test_other_requests_between_change_nothing(served: Running) -> None:
    answer, first, _ = ask(served, BOOK)
    for number in range(3):
        ask(served, [user(f"Write a title, number {number}.")])
    _, second, cached = ask(served, [*BOOK, assistant(answer), user("And?")])
    assert cached >= first and second - cached < 40


def test_an_edited_turn_forks_and_both_go_on(served: Running) -> None:
    first, tokens, _ = ask(served, BOOK)
    second, *_ = ask(served, [*BOOK, assistant(first), user("And then?")])
    edited, total, cached = ask(served, [*BOOK, assistant(first), user("Why not?")])
    assert tokens <= cached and total - cached < 40
    assert len(served.sessions()) == 2
    for middle, answer in (("And then?", second), ("Why not?", edited)):
        messages = [*BOOK, assistant(first), user(middle), assistant(answer), user("So?")]
        _, total, cached = ask(served, messages)
        assert total - cached < 40
    assert len(served.sessions()) == 2


def test_same_prompt_again_is_not_computed_again_and_answers_alike(served: Running) -> None:
    first, tokens, _ = ask(served, BOOK)
    again, _, cached = ask(served, BOOK)
    assert again == first and tokens - cached <= 8


def test_stop_string_does_not_part_a_conversation(served: Running) -> None:
    whole, *_ = ask(served, BOOK, max_tokens=30)
    cut, first, _ = ask(served, BOOK, max_tokens=30, stop=whole[9:12])
    before = len(served.sessions())
    _, second, cached = ask(served, [*BOOK, assistant(cut), user("And?")])
    assert cached >= first - 8 and second - cached < 60 and len(served.sessions()) == before


def test_a_named_session_is_shared_and_never_changed(start, loaded, tmp_path) -> None:
    from kvswap.app.engine import load
    from kvswap.config import Config

    with load(loaded, Config(kv_dir=str(tmp_path / "kv"), kv_memory="16MiB"), session="mine") as engine:
        answer = "".join(engine.chat(BOOK, max_new_tokens=8))
        tokens = engine.session.tokens if engine.session else 0
    served = start()
    _, _, cached = ask(served, [*BOOK, assistant(answer), user("And?")])
    assert cached > 1000
    served.stop()
    with open_store(str(tmp_path / "kv"), "mine", write=False) as store:
        contents = store.load(tail_only=True)
        assert contents is not None and contents.tokens == tokens


def test_nothing_stays_of_a_request_that_is_not_to_be_stored(served: Running) -> None:
    before = sorted(path for path in served.kv_dir.rglob("*") if path.is_file())
    answer, _, cached = ask(served, BOOK, store=False)
    assert cached == 0 and answer == ask(served, BOOK, store=False)[0]
    assert served.sessions() == []
    assert sorted(path for path in served.kv_dir.rglob("*") if path.is_file()) == before


def test_a_session_that_was_removed_meanwhile_is_computed_again(served: Running) -> None:
    answer, *_ = ask(served, BOOK)
    ask(served, [user("Something else.")])  # the first one is closed now
    closed = [each for each in entries(served.kv_dir / "sessions") if not each.in_use]
    for each in closed:
        remove(each.path)
    assert len(closed) == 1
    again, _, cached = ask(served, BOOK)
    assert again == answer and cached == 0


def test_a_failing_disk_is_an_error_and_the_next_request_works(served: Running, monkeypatch) -> None:
    from kvswap.sessions.commits import SessionStore

    def fail(*arguments: object, **options: object) -> None:
        raise DiskReadError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(SessionStore, "commit", fail)
        found = served.http.post("/v1/chat/completions", json={"messages": BOOK, "max_tokens": 2})
        assert found.status_code == 500 and "the disk is gone" in found.json()["error"]["message"]
    assert ask(served, BOOK)[0]


# ---- clients that go away


def test_client_that_leaves_a_prompt_keeps_what_was_read(served: Running, monkeypatch) -> None:
    monkeypatch.setattr("kvswap.serve.answers.PIECE_TOKENS", 512)
    monkeypatch.setattr("kvswap.serve.answers.PROGRESS_S", 0.0)
    long = [user(STORY * 4)]
    body = {"messages": long, "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            found = re.search(r'"processed": (\d+)', line)
            if found and int(found[1]) > 1100:
                break
    served.idle()
    _, tokens, cached = ask(served, long)
    assert 500 < cached < tokens - 1000
    assert len(served.sessions()) == 1
    served.stop()


def test_a_fork_that_is_left_at_once_leaves_nothing(served: Running) -> None:
    answer, *_ = ask(served, BOOK)
    before = served.sessions()
    body = {"messages": [*BOOK, assistant(answer + "?"), user(STORY * 2)], "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(line for line in response.iter_lines() if "prompt_progress" in line)
    served.idle()
    assert served.sessions() == before
    _, total, cached = ask(served, [*BOOK, assistant(answer), user("And?")])
    assert total - cached < 40 and served.sessions() == before


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_stops_the_work(served: Running, stream: bool) -> None:
    body = {"messages": [user("Who?")], "max_tokens": 6000, "stream": stream}
    if stream:
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(line for line in response.iter_lines() if '"content": "' in line and '"content": ""' not in line)
    else:
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/v1/chat/completions", json=body, timeout=1)
    started_s = time.monotonic()
    served.idle(10)
    assert time.monotonic() - started_s < 10
    assert ask(served, [user("Who?")])[0]


def test_waiting_requests_have_a_limit_and_leave_the_queue(start) -> None:
    served = start(max_waiting=1)
    long = {"messages": [user("Who?")], "max_tokens": 6000, "stream": True}
    short = {"messages": [user("Who?")], "max_tokens": 1}
    with served.http.stream("POST", "/v1/chat/completions", json=long) as response:
        lines = response.iter_lines()  # kept, for the connection is closed when it goes
        next(line for line in lines if '"content": "' in line and '"content": ""' not in line)
        waits = threading.Thread(target=lambda: statuses.append(post(short)))
        statuses = list[int]()

        def post(body: object) -> int:
            return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30).status_code

        waits.start()
        deadline = time.monotonic() + 60
        while not served.worker.waiting:
            assert time.monotonic() < deadline and waits.is_alive()
            time.sleep(0.01)
        refused = served.http.post("/v1/chat/completions", json=short)
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert served.http.get("/health").json() == {"status": "ok", "waiting": 1, "running": True}
    waits.join(30)
    assert statuses == [200]


def test_keep_alive_while_nothing_happens(served: Running, monkeypatch) -> None:
    monkeypatch.setattr("kvswap.serve.service.KEEP_ALIVE_S", 0.02)
    body = {"messages": BOOK, "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = list(response.iter_lines())
    assert ": keep-alive" in lines and lines[-2] == "data: [DONE]"


def test_end_of_the_server_ends_a_stream_with_an_error(served: Running) -> None:
    body = {"messages": [user("Who?")], "max_tokens": 6000, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if '"content": "' in line and '"content": ""' not in line)
        served.server.should_exit = True
        rest = list(lines)
    assert any('"error"' in line and "ending" in line for line in rest)
