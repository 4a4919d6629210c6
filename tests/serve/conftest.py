"""A real server on loopback, with a tiny model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from kvswap.config import Config
from kvswap.models.loading import LoadedModel, load_model
from kvswap.serve.answers import Settings
from kvswap.serve.server import Listening, create, listen
from kvswap.sessions.quota import Limits
from tests.helpers.folders import save_tiny

STORY = "".join(f"In chapter {number} the king of place {number} counts. " for number in range(40))


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """It never ends an answer by itself: where a random model does so differs from processor to processor."""
    found = load_model(str(save_tiny(tmp_path_factory.mktemp("served"), max_position_embeddings=8192)))
    found.model.generation_config.suppress_tokens = [found.tokenizer.eos_token_id]
    return found


class Running:
    """A server in a thread of this process."""

    def __init__(self, loaded: LoadedModel, kv_dir: Path, *, limits: Limits | None = None, **listening: Any) -> None:
        config = Config(kv_dir=str(kv_dir), kv_memory="16MiB")
        self.kv_dir = kv_dir
        self._socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        settings = Settings(config=config, limits=limits or Limits())
        self.server, self.worker = create(loaded, settings, Listening(alias="tiny", **listening))
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self.worker.start()
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def stop(self) -> None:
        """End it as a signal does. May be called twice."""
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive() and self.worker.join(30)
        self._socket.close()

    def sessions(self) -> list[str]:
        """Names of what is stored."""
        folder = self.kv_dir / "sessions"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []

    def idle(self, within_s: float = 20) -> None:
        """Wait until nothing runs or waits."""
        deadline = time.monotonic() + within_s
        while self.worker.running or self.worker.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def start(loaded: LoadedModel, tmp_path: Path, cache_home: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers on one folder; they end with the test."""
    running: list[Running] = []

    def call(**options: Any) -> Running:
        running.append(Running(loaded, tmp_path / "kv", **options))
        return running[-1]

    yield call
    for each in running:
        each.stop()


@pytest.fixture
def served(start: Callable[..., Running]) -> Running:
    return start()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
