"""Many clients at once, some of which go away: every answer is that of a fresh run, and nothing is left over."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.serve.conftest import STORY, Running, user

PROMPTS = [STORY[: 700 + 90 * number] + f" Who is number {number}?" for number in range(6)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def expected(start) -> list[str]:
    """Each answer of a server that has stored nothing."""
    served = start()
    found = []
    for prompt in PROMPTS:
        body = {"messages": [user(prompt)], "max_tokens": 6, "store": False}
        found.append(served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])
    served.stop()
    return found


def client(served: Running, answers: list[str], requests: int, number: int) -> int:
    """Send requests, leave some half-way; how many were answered in full."""
    chance, complete = random.Random(number), 0
    with httpx.Client(base_url=served.url, timeout=120) as http:
        for _ in range(requests):
            which = chance.randrange(len(PROMPTS))
            body = {"messages": [user(PROMPTS[which])], "max_tokens": 6, "stream": True}
            if chance.random() < 0.3:
                body["max_tokens"] = 500
                with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    for _, _ in zip(range(chance.randrange(6)), response.iter_lines(), strict=False):
                        pass
                continue
            found = http.post("/v1/chat/completions", json={**body, "stream": False})
            assert found.status_code == 200, found.text
            assert found.json()["choices"][0]["message"]["content"] == answers[which]
            complete += 1
    return complete


def crowd(start, clients: int, requests: int, restarts: int) -> None:
    answers = expected(start)
    before, threads = descriptors(), threading.active_count()
    for turn in range(restarts):
        served = start(max_waiting=clients)
        with ThreadPoolExecutor(clients) as pool:
            numbers = [turn * clients + number for number in range(clients)]
            done = list(pool.map(partial(client, served, answers, requests), numbers))
        assert sum(done) > clients * requests // 3
        served.idle(60)
        served.stop()
        assert not [path for path in served.kv_dir.rglob(".new-*")]
    deadline = time.monotonic() + 60  # idle threads of pools end by themselves
    while descriptors() > before + 1 or threading.active_count() > threads:
        assert time.monotonic() < deadline, f"{descriptors()} descriptors, {threading.active_count()} threads"
        time.sleep(0.05)


def test_a_few_clients(start) -> None:
    crowd(start, clients=4, requests=5, restarts=2)


@pytest.mark.slow
def test_two_hundred_requests(start) -> None:
    crowd(start, clients=8, requests=9, restarts=3)
