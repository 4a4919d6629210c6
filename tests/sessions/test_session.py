"""Sessions: a reopened one continues with the same tokens; ways back; what is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from kvswap.config import Config
from kvswap.models.loading import LoadedModel
from kvswap.sessions.catalog import session_path
from kvswap.sessions.check import check
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
def test_reopened_session_continues_with_the_same_tokens(family: str, config: Config) -> None:
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


def test_truncate_keeps_whole_groups_and_undo_goes_back(config: Config) -> None:
    with Session.create("s", loaded("llama"), config) as session:
        session.append(tokens(1, 301)[0].tolist())
        ids = session.token_ids
        assert session.truncate(301) == 300 and session.token_ids == ids
        assert session.truncate(203) == 200 and session.token_ids == ids[:200]
        session.undo()
        assert session.token_ids == ids and session.tokens == 300
        for nothing in (3, 0, -1):
            assert session.truncate(nothing) == 0 and session.token_ids == []
            session.undo()
            assert session.token_ids == ids and session.tokens == 300
        session.truncate(0)
        session.append([5, 6, 7])
        assert session.token_ids == [5, 6, 7]
    with Session.open("s", loaded("llama"), config) as session:
        assert session.token_ids == [5, 6, 7]
        session.undo()
        assert session.token_ids == ids and check(session.store).problems == []


def test_context_with_sliding_windows_is_truncated_to_nothing(config: Config) -> None:
    with Session.create("s", loaded("gemma3"), config) as session:
        session.append(tokens(1, 301)[0].tolist())
        ids = session.token_ids
        assert session.truncate(203) == 0 and session.token_ids == []
        session.undo()
        assert session.token_ids == ids


def test_rollback_forgets_what_was_not_committed(config: Config) -> None:
    with Session.create("s", loaded("llama"), config) as session:
        session.append(tokens(1, 301)[0].tolist())
        ids = session.token_ids
        session._forward(tokens(1, 80, seed=2)[0].tolist())
        assert session.tokens == 380
        session.rollback()
        assert session.tokens == 300 and session.token_ids == ids
        session.truncate(0)
        session.rollback()
        assert session.tokens == 300 and session.token_ids == ids
        assert sorted(session.store.folder.names()) == sorted([*session.store.manifest.files(), "manifest", "lock"])


def test_truncation_forgets_a_segment_that_was_not_committed(config: Config) -> None:
    """A fork writes new groups to a file of its own, which is begun again after the truncation."""
    with Session.create("s", loaded("llama"), config) as session:
        session.append(tokens(1, 201)[0].tolist())
        session.fork("fork")
    with Session.open("fork", loaded("llama"), config) as session:
        session._forward(tokens(1, 80, seed=2)[0].tolist())
        session.truncate(100)
        session.append(tokens(1, 81, seed=3)[0].tolist())
        assert session.tokens == 180 and check(session.store).problems == []
        session.undo()
        assert session.tokens == 200 and check(session.store).problems == []


def test_commits_and_shared_prefixes_are_logged(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kvswap")
    prompt = tokens(1, 301)[0].tolist()
    with Session.create("first", loaded("llama"), config) as session:
        session.append(prompt)
        session.load_or_recompute(400)
    Session.create("second", loaded("llama"), config, prompt=prompt).close()
    assert "session first: committed 300 tokens, " in caplog.text
    assert "session first: 300 of 400 prompt tokens are stored; Choice(recompute=False" in caplog.text
    assert "session second: shares 300 tokens with session first" in caplog.text


def test_empty_session_is_discarded_only_on_request(config: Config) -> None:
    path = session_path(config.kv_dir, "s")
    Session.create("s", loaded("llama"), config).close()
    assert path.exists()
    with Session.open("s", loaded("llama"), config) as session:
        session.append([5, 6, 7])
        session.close(discard_empty=True)
    assert path.exists()
    Session.create("empty", loaded("llama"), config).close(discard_empty=True)
    assert not path.with_name("empty").exists()


def test_one_token_is_appended_to_what_is_stored(config: Config) -> None:
    """Nothing is to be computed then, only the token id and the conversation are committed."""
    prompt, answers = tokens(1, 301)[0].tolist(), []
    with Session.create("whole", loaded("llama"), config) as session:
        session.append(prompt)
        answers.append("".join(session.generate(max_new_tokens=9)))
    with Session.create("apart", loaded("llama"), config) as session:
        session.append(prompt)
        assert session.truncate(300) == 300 and len(session.token_ids) == 300
        assert session.append(prompt[-1:]) == 0 and session.token_ids == prompt
    with Session.open("apart", loaded("llama"), config) as session:
        session.commit(session.token_ids, b'["hello"]')
        with pytest.raises(ValueError, match="302 token ids for 300 tokens"):
            session.commit([*session.token_ids, 5])
    with Session.open("apart", loaded("llama"), config) as session:
        assert session.token_ids == prompt and session.conversation == b'["hello"]'
        answers.append("".join(session.generate(max_new_tokens=9)))
        session.undo()
        session.undo()
        assert session.token_ids == prompt and session.conversation == b"" and check(session.store).problems == []
    with Session.create("new", loaded("llama"), config, prompt=prompt) as session:
        answers.append("".join(session.generate(max_new_tokens=9)))
    assert answers == answers[:1] * 3
