"""Hosts, origins, keys, sizes and malformed requests: 4xx in OpenAI's shape, never a 500 or a key in a log."""

from __future__ import annotations

import json
import logging
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvswap.errors import ConfigError
from kvswap.serve.guard import MOST_BODY_BYTES
from kvswap.serve.server import listen, read_keys
from tests.serve.conftest import Running, user

BODY = {"messages": [user("Who?")], "max_tokens": 1}
CHAT = "/v1/chat/completions"


def raw(served: Running, request: bytes, *, more: bytes = b"") -> bytes:
    """What the server answers to bytes, before ``more`` of a body is sent."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request + more)
        return connection.recv(1 << 16)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "", "localhost.evil.example", "[::1", "1.2.3.4.evil"]
)
def test_other_hosts_are_refused(served: Running, host: str) -> None:
    found = served.http.get("/v1/models", headers={"Host": host})
    assert found.status_code in (400, 403) and "data" not in found.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "192.168.1.5"])
def test_addresses_and_localhost_are_ours(served: Running, host: str) -> None:
    assert served.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_name_can_be_allowed(start) -> None:
    served = start(hosts=["Kvswap.lan"])
    assert served.http.get("/health", headers={"Host": "kvswap.lan"}).status_code == 200
    assert served.http.get("/health", headers={"Host": "other.lan"}).status_code == 403


def test_pages_of_other_sites_are_refused(served: Running) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        found = served.http.post(CHAT, json=BODY, headers={"Origin": origin})
        assert found.status_code == 403 and "access-control-allow-origin" not in found.headers
    own = served.http.post(CHAT, json=BODY, headers={"Origin": served.url})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    assert served.http.options(CHAT, headers={"Origin": "https://evil.example"}).status_code == 403


def test_key_is_asked_for_and_not_logged(start, caplog, capfd) -> None:
    served = start(keys=["s3cret-key", "other"])
    with caplog.at_level(logging.DEBUG):
        assert served.http.post(CHAT, json=BODY).status_code == 401
        for given_key, status in (("s3cret-key", 200), ("other", 200), ("s3cret", 401), ("\u00e9", 401)):
            header = f"Bearer {given_key}".encode()
            assert served.http.post(CHAT, json=BODY, headers={b"Authorization": header}).status_code == status
        assert served.http.get("/health").status_code == 200 and served.http.get("/").status_code == 200
        assert served.http.get("/metrics").status_code == 401
    assert "s3cret" not in caplog.text and "s3cret" not in "".join(capfd.readouterr())


def test_large_bodies_are_refused_before_they_are_read(served: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MOST_BODY_BYTES + 1}\r\n\r\n".encode()
    assert b" 413 " in raw(served, head)
    assert b" 400 " in raw(served, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n".encode())


def test_chunked_bodies_are_cut_at_the_limit(served: Running, monkeypatch) -> None:
    monkeypatch.setattr("kvswap.serve.guard.MOST_BODY_BYTES", 1000)
    found = served.http.post(CHAT, content=(b"x" * 300 for _ in range(10)))
    assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"


def test_a_slow_client_does_not_stop_others(served: Running) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert served.http.post(CHAT, json=BODY).status_code == 200


def test_no_such_path_or_method(served: Running) -> None:
    assert served.http.get("/v1/none").json()["error"]["type"] == "invalid_request_error"
    assert served.http.get(CHAT).status_code == 405
    assert served.http.get("/../../etc/passwd").status_code == 404


def test_an_error_that_nobody_expected_says_nothing_of_the_inside(served: Running, monkeypatch, caplog) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr("kvswap.serve.answers.Answers._open", fail)
    found = served.http.post(CHAT, json=BODY)
    assert found.status_code == 500 and "inside" not in found.text and "inside" in caplog.text
    monkeypatch.undo()
    assert served.http.post(CHAT, json=BODY).status_code == 200


FIELDS = st.sampled_from(
    [
        *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "tools", "tool_choice", "store"),
        *("response_format", "prompt", "echo", "input", "instructions", "content"),
    ]
)
KEYS = st.sampled_from(["role", "content", "type", "text", "include_usage", "function"])
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-2, 3), st.floats(), st.text(max_size=8),
        st.sampled_from(["user", "text", "\ud800", "\x00", "Who?"]),
        st.just([user("Who?")]),
        st.just(10**400),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=5,
)  # fmt: skip
MALFORMED = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(FIELDS, VALUES, max_size=5).map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda body, more: json.dumps({**more, **body}).encode(),
        st.just({**BODY, "prompt": "Who?", "input": "Who?", "content": "x", "max_output_tokens": 1, "stream": False}),
        st.dictionaries(FIELDS, VALUES, max_size=3),
    ),
    st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 50_000, b'{"messages":[{"role":"user","content":"\\ud800"}]}', b"1" * 5000]
    ),
)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/tokenize"])
def test_malformed_bodies_are_client_errors(start, path: str, caplog) -> None:
    served = start(max_new_tokens=2)

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(body=MALFORMED)
    def check(body: bytes) -> None:
        found = served.http.post(path, content=body)
        assert 200 <= found.status_code < 500, (body[:300], found.text)
        if found.status_code >= 400:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert "Traceback" not in caplog.text
    assert served.http.post(CHAT, json=BODY).status_code == 200


def test_files_of_keys(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(str(file)) == ["one", "two"]
    file.write_text("\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="--api-key-file"):
            read_keys(str(path))


def test_a_port_in_use_is_said_before_a_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host"):
        listen("no such host", 0)
