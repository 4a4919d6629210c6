"""A question that fails leaves conversation and session as they were; a stored context is continued, not replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvswap.app.documents import Document
from kvswap.app.engine import Engine, load
from kvswap.config import Config
from kvswap.core.batch_state import BatchState
from kvswap.core.prefill import Prefill
from kvswap.errors import DiskFullError, DiskWriteError, InputError, MemoryBudgetError, StorageError
from kvswap.models.loading import LoadedModel, load_model
from kvswap.sessions.check import check
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.quota import Quota
from kvswap.sessions.session import Session

pytestmark = pytest.mark.usefixtures("cache_home")
OLD = Document("old.txt", "".join(f"Line {number} of a story. " for number in range(30)))
NEW = Document("new.txt", "".join(f"Other words, part {number}. " for number in range(40)))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    from tests.helpers.folders import save_tiny

    return load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=400, recent_tokens=16, kv_memory="8MiB", kv_dir=str(tmp_path / "kv"))


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


PLACES: list[tuple[Any, str, BaseException]] = [
    (Quota, "_check_writes", StorageError("write limit")),
    (Prefill, "finish", KeyboardInterrupt()),
    (Prefill, "done", DiskFullError("no space")),
    (BatchState, "append", MemoryBudgetError("memory")),
    (Session, "load_or_recompute", KeyboardInterrupt()),
    (Session, "commit_prompt", KeyboardInterrupt()),
    (Session, "truncate", DiskWriteError("disk")),
    (SessionStore, "commit", DiskWriteError("disk")),
]


@pytest.mark.parametrize("continues", [True, False])
def test_failed_question_takes_nothing_away(continues: bool, loaded, config, monkeypatch) -> None:
    def ask(engine: Engine, words: str) -> list[int]:
        if not continues:
            engine.new_conversation()
        list(engine.ask(words, [NEW], max_new_tokens=5))
        return engine.stats.token_ids

    with load(loaded, config, session="tale") as engine:
        list(engine.ask("Who?", [OLD], max_new_tokens=5))
        session = engine.session
        assert session is not None
        before = session.token_ids, session.conversation
        assert session.tokens > 600
        for place, name, error in PLACES:
            with monkeypatch.context() as patch:
                patch.setattr(place, name, raiser(error))
                with pytest.raises(type(error)):
                    ask(engine, "What?")
            assert (session.token_ids, session.conversation) == before, (place, name)
        assert (session.store.manifest.checkpoints[-1].tokens, len(session.store.manifest.checkpoints)) == (
            len(before[0]) - 1,
            1,
        )
    with load(loaded, config, session="tale") as engine:
        assert engine.session is not None
        assert (engine.session.token_ids, engine.session.conversation) == before
        assert check(engine.session.store).problems == []
        answer = ask(engine, "What?")
    with load(loaded, config, session="twin") as engine:
        list(engine.ask("Who?", [OLD], max_new_tokens=5))
        assert ask(engine, "What?") == answer


def test_context_made_in_python_is_gone_on_from(loaded, config) -> None:
    context = [*range(3, 250)] * 2
    with Session.create("made", loaded, config, prompt=context):
        pass
    with load(loaded, config, session="made") as engine:
        list(engine.ask("Who?", max_new_tokens=4))
        assert engine.stats.resumed_tokens == len(context) - 1
        assert engine.session is not None and engine.session.token_ids[: len(context)] == context
        list(engine.ask("And?", max_new_tokens=4))
    with load(loaded, config, session="made") as engine:
        list(engine.ask("Why?", max_new_tokens=4))
        assert engine.session is not None and engine.session.token_ids[: len(context)] == context
        assert engine.stats.resumed_tokens > len(context)


def test_failure_after_a_prefix_was_shared_does_not_make_it_a_context(loaded, config, monkeypatch) -> None:
    with load(loaded, config, session="tale") as engine:
        list(engine.ask("Who?", [OLD], max_new_tokens=5))
    with load(loaded, config, session="other") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Prefill, "finish", raiser(DiskFullError("no space")))
            with pytest.raises(DiskFullError):
                list(engine.ask("What?", [OLD], max_new_tokens=5))
        list(engine.ask("What?", [OLD], max_new_tokens=5))
        assert engine.stats.resumed_tokens >= 600 and engine.stats.computed_tokens < 60


def test_token_ids_past_the_vocabulary_are_refused(loaded, config, monkeypatch) -> None:
    with load(loaded, config, session="tale") as engine:
        monkeypatch.setattr("kvswap.app.prompt.encode", lambda *_, **__: [5, 10**6])
        with pytest.raises(InputError, match="token id 1000000 at position 1"):
            next(engine.ask("Who?"))


def test_failures_leave_no_trace_in_the_account_of_memory(loaded, config, monkeypatch) -> None:
    def parts(name: str, failures: list[tuple[Any, str, BaseException]]) -> dict[str, int]:
        with load(loaded, config, session=name) as engine:
            list(engine.ask("Who?", [OLD], max_new_tokens=5))
        with load(loaded, config, session=name) as engine:
            for place, method, error in failures:
                with monkeypatch.context() as patch:
                    patch.setattr(place, method, raiser(error))
                    with pytest.raises(type(error)):
                        list(engine.ask("What?", [NEW], max_new_tokens=5))
            list(engine.ask("What?", [NEW], max_new_tokens=5))
            return {**engine.stats.memory_parts, "peak": engine.stats.kv_memory_peak_bytes}

    assert parts("failed", PLACES) == parts("fine", [])


def test_an_answer_that_cannot_fit_is_refused_before_the_prompt(loaded, config) -> None:
    with load(loaded, config.replace(kv_memory="64KiB")) as engine, pytest.raises(MemoryBudgetError) as caught:
        list(engine.ask("Who?", [OLD], max_new_tokens=5))
    config = config.replace(kv_memory=caught.value.minimum_bytes)  # for the prompt and 256 tokens
    with load(loaded, config) as engine:
        with pytest.raises(MemoryBudgetError, match=r"an answer of up to .* lower max_new_tokens"):
            list(engine.ask("Who?", [OLD], max_new_tokens=1000))
        assert engine.stats.computed_tokens == 0
        list(engine.ask("Who?", [OLD], max_new_tokens=5))
        assert engine.stats.new_tokens == 5
    with Session.create("s", loaded, config, prompt=[*range(3, 250)] * 2) as session:
        with pytest.raises(MemoryBudgetError, match="an answer of up to"):
            list(session.generate(max_new_tokens=1000))
        assert list(session.generate(max_new_tokens=2))
