"""Sessions: what is committed comes back, goes on with the same tokens, and is shared without copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvswap.config import Config
from kvswap.models.loading import LoadedModel
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

FAMILIES = ("llama", "gemma3")


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    """Calibrations are shared by the tests of this run and stay out of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Something is always left out, so that a wrong sketch or window would change tokens."""
    return Config(select_tokens=56, recent_tokens=16, sink_tokens=4, kv_memory="4MiB", kv_dir=str(tmp_path / "kv"))


def loaded(family: str) -> LoadedModel:
    model = tiny_model(family, vocab_size=300)
    return LoadedModel(model, byte_tokenizer(), f"tiny-{family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_reopened_session_goes_on_with_the_same_tokens(family: str, config: Config) -> None:
    model, prompt, more = loaded(family), tokens(1, 301)[0].tolist(), tokens(1, 41, seed=3)[0].tolist()

    def run(name: str, between: Callable[[Session], Session]) -> list[int]:
        with Session.create(name, model, config) as session:
            session.append(prompt)
            session = between(session)
            list(session.generate(max_new_tokens=23))
            session = between(session)
            session.append(more)
            session = between(session)
            list(session.generate(max_new_tokens=30))
            ids = session.token_ids
            session.close()
        return ids

    def reopen(session: Session) -> Session:
        session.close()
        return Session.open(session.name, model, config)

    assert run("a", lambda session: session) == run("b", reopen)
