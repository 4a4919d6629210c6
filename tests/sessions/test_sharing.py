"""A new session shares the prefix of its prompt that another one stores, token by token, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvswap.config import Config
from kvswap.sessions.catalog import remove, sibling_paths
from kvswap.sessions.check import check
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.session import Session
from kvswap.sessions.sharing import MIN_SHARED_TOKENS, find_prefix
from tests.helpers.families import tokens
from tests.laws.test_resume import loaded

PROMPT = tokens(1, 601)[0].tolist()
CONVERSATION = b'["words of the first session"]'


@pytest.fixture(autouse=True)
def environment(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv(KEY_VARIABLE, "5c" * 32)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Everything is selected and stored without rounding: what is computed otherwise must come out the same."""
    return Config(select_tokens=4000, store_dtype="float32", kv_memory="64MiB", kv_dir=str(tmp_path / "kv"))


def make_source(config: Config, family: str = "llama", *, encrypt: bool = False) -> Path:
    """A closed session with the prompt, a turn and a conversation; its folder."""
    with Session.create("source", loaded(family), config, encrypt=encrypt) as session:
        session.append(PROMPT)
        session.commit(session.token_ids, CONVERSATION)
        list(session.generate(max_new_tokens=6))
        return session.store.folder.path


def new_prompt(shared: int) -> list[int]:
    """The first tokens of ``PROMPT``, then others."""
    return [*PROMPT[:shared], *((each + 1) % 300 for each in PROMPT[shared : shared + 40])]


def answer(session: Session) -> list[int]:
    list(session.generate(max_new_tokens=25))
    return session.token_ids


@pytest.mark.parametrize("encrypt", [False, True])
def test_prefix_is_shared_up_to_a_whole_group(encrypt, config, tmp_path) -> None:
    source, prompt = make_source(config, encrypt=encrypt), new_prompt(470)
    before = {file.name: file.read_bytes() for file in source.iterdir() if file.name != "lock"}
    alone = config.replace(kv_dir=str(tmp_path / "alone"))
    with Session.create("new", loaded("llama"), alone) as session:
        assert session.append(prompt) == len(prompt) - 1
        expected = answer(session)
    with Session.create("new", loaded("llama"), config, encrypt=encrypt) as session:
        assert session.share_prefix(prompt) == "source"
        assert session.token_ids == prompt[:468] and session.conversation == b""
        assert session.append(prompt[468:]) == len(prompt) - 1 - 468
        assert answer(session) == expected
        assert check(session.store).problems == []
        assert (session.store.manifest.encryption is not None) == encrypt
        assert all(session.store.folder.stat(name).st_nlink == 2 for name in ("basis", "index-0", "data-0"))
    assert {file.name: file.read_bytes() for file in source.iterdir() if file.name != "lock"} == before
    remove(source)
    with Session.open("new", loaded("llama"), config) as session:
        assert session.token_ids == expected and check(session.store).problems == []
        list(session.generate(max_new_tokens=3))


def test_create_takes_a_prompt(config) -> None:
    make_source(config)
    with Session.create("new", loaded("llama"), config, prompt=new_prompt(470)) as session:
        assert session.token_ids == new_prompt(470)
        assert [each.number for each in session.store.manifest.segments] == [0, 1]
        session.undo()
        assert session.tokens == 468
        session.undo()
        assert session.tokens == 0 and session.token_ids == []
    with Session.create("text", loaded("llama"), config, prompt="In the beginning") as session:
        assert session.tokens > 4


def test_whole_session_is_shared_with_its_unfinished_group(config) -> None:
    make_source(config, "gemma3")
    with Session.open("source", loaded("gemma3"), config) as session:
        whole = session.token_ids[: session.tokens]
    longer = [*whole, 7, 8, 9]
    with Session.create("new", loaded("gemma3"), config) as session:  # which has sliding-window layers
        assert session.share_prefix(longer) == "source" and session.tokens == len(whole)
        assert session.append(longer[len(whole) :]) == 2
        first = answer(session)
    with Session.create("again", loaded("gemma3"), config.replace(kv_dir=config.kv_dir + "2")) as session:
        session.append(longer)
        assert answer(session) == first
    with Session.create("cut", loaded("gemma3"), config) as session:  # no way back into the middle
        assert session.share_prefix(new_prompt(470)) is None and session.tokens == 0


@pytest.mark.parametrize(
    ("change", "model"),
    [
        ({"group_tokens": 8}, "llama"),
        ({"recent_tokens": 32}, "llama"),
        ({"sketch_rank": 8}, "llama"),
        ({"store_dtype": "auto"}, "llama"),
        ({}, "qwen2"),
    ],
)
def test_another_model_or_layout_shares_nothing(change, model, config) -> None:
    make_source(config)
    with Session.create("new", loaded(model), config.replace(**change)) as session:
        assert session.share_prefix(new_prompt(470)) is None
    with Session.create("same", loaded("llama"), config) as session:
        assert session.share_prefix(new_prompt(470)) == "source"


def test_what_does_not_fit_is_left_alone(config, monkeypatch) -> None:
    source = make_source(config)
    with Session.create("short", loaded("llama"), config) as session:
        assert session.share_prefix(new_prompt(MIN_SHARED_TOKENS - 1)) is None  # not worth it
        assert session.share_prefix([PROMPT[0] + 1, *PROMPT[1:]]) is None  # the same but for the first token
        assert session.share_prefix([*PROMPT[1:]]) is None  # the same but shifted
    with Session.create("secret", loaded("llama"), config, encrypt=True) as session:
        assert session.share_prefix(new_prompt(470)) is None  # plain files in an encrypted session
    with Session.open("source", loaded("llama"), config), Session.create("busy", loaded("llama"), config) as session:
        assert session.share_prefix(new_prompt(470)) is None  # not closed
    with Session.create("full", loaded("llama"), config) as session:
        session.append([1, 2, 3])
        assert session.share_prefix(new_prompt(470)) is None
    for name in ("basis", "manifest"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[: len(data) // 2])
    with Session.create("damaged", loaded("llama"), config) as session:
        assert session.share_prefix(new_prompt(470)) is None


def test_the_longest_is_found_first(config) -> None:
    source = make_source(config)
    with Session.create("shorter", loaded("llama"), config) as session:
        session.append(new_prompt(300))
    found = find_prefix(sibling_paths(source.with_name("new")), new_prompt(470), lambda manifest: True)
    assert [(count, path.name) for count, path in found] == [(468, "source"), (300, "shorter")]


def test_interrupted_sharing_leaves_an_empty_session(config, monkeypatch) -> None:
    make_source(config)
    session, real = Session.create("new", loaded("llama"), config), os.rename

    def refuse(*args: object, **more: object) -> None:
        raise OSError(5, "no")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(Exception, match="cannot be replaced"):
        session.share_prefix(new_prompt(470))
    monkeypatch.setattr(os, "rename", real)
    session.close()
    with Session.open("new", loaded("llama"), config) as session:
        assert session.tokens == 0
        assert sorted(os.listdir(session.store.folder.path)) == ["lock", "manifest"]
        assert session.share_prefix(new_prompt(470)) == "source"
