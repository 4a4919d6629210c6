"""A change that fails or is interrupted leaves an open session as it was, or as it was to become; never in between.

The other tests of failures open the session anew afterwards. Here the same object goes on.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvswap.config import Config
from kvswap.errors import DiskReadError, DiskWriteError, InputError, KVSwapError
from kvswap.models.loading import LoadedModel
from kvswap.sessions.check import check
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

CALLS = ("fdatasync", "fsync", "rename", "unlink")
LOST, MORE = tokens(1, 61, seed=1)[0].tolist(), tokens(1, 47, seed=2)[0].tolist()
pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), "tiny-llama")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=56, recent_tokens=16, kv_memory="4MiB", kv_dir=str(tmp_path / "kv"), backend="threads")


@contextmanager
def failing(number: int, error: BaseException, *, late: bool) -> Iterator[list[str]]:
    """Raise ``error`` at one of the calls that make files durable, counted from 0: before it is made, or after."""
    seen: list[str] = []

    def stand_in(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            now = len(seen) == number + 1
            if now and not late:
                raise error
            result = real(*args, **kwargs)
            if now:
                raise error
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, stand_in(name, getattr(os, name)))
        yield seen


def first(session: Session) -> None:
    session.append(tokens(1, 130)[0].tolist())
    list(session.generate(max_new_tokens=5))


def change(session: Session, kind: str) -> None:
    if kind == "append":
        session.append(LOST)
    elif kind == "generate":
        list(session.generate(max_new_tokens=6))
    elif kind == "truncate":
        session.truncate(90)
        session.append(LOST)
    elif kind == "text":
        session.commit(session.token_ids, b'["words"]')
    else:
        session.undo()


def go_on(session: Session) -> list[int]:
    """Token ids of a continuation, which depend on every K, V."""
    session.append(MORE)
    list(session.generate(max_new_tokens=12))
    return session.token_ids


def expected(model: LoadedModel, config: Config, kind: str | None) -> list[int]:
    with Session.create(f"reference-{kind}", model, config) as session:
        first(session)
        if kind is not None:
            change(session, kind)
        return go_on(session)


@pytest.mark.parametrize("kind", ["append", "generate", "truncate", "text", "undo"])
def test_open_session_goes_on_after_every_failure(kind: str, model, config) -> None:
    with Session.create("survey", model, config) as session:
        first(session)
        before = session.token_ids, session.conversation
        with failing(-1, OSError(), late=False) as seen:
            change(session, kind)
        after = session.token_ids, session.conversation
    reached = [expected(model, config, None), expected(model, config, kind)]
    ended = 0
    for number in range(len(seen)):
        late = number % 2 == 0 or seen[number] == "rename"
        error = KeyboardInterrupt() if late else OSError(errno.EIO, os.strerror(errno.EIO))
        with Session.create(f"s{number}", model, config) as session:
            first(session)
            try:
                with failing(number, error, late=late):
                    change(session, kind)
            except (KVSwapError, KeyboardInterrupt):
                ended += 1
                state = session.token_ids, session.conversation
                assert state in (before, after), (number, seen[number])
            assert go_on(session) in reached, (number, seen[number])
        with Session.open(f"s{number}", model, config) as session:
            assert session.token_ids in reached and check(session.store).problems == [], (number, seen[number])
    assert ended > len(seen) // 2


def test_lost_text_is_not_committed_by_the_next_append(model, config, monkeypatch) -> None:
    reached = expected(model, config, None)
    with Session.create("s", model, config) as session:
        first(session)
        with monkeypatch.context() as patch:
            patch.setattr(session.store, "commit", lambda **_: (_ for _ in ()).throw(DiskWriteError("planted")))
            with pytest.raises(DiskWriteError, match="planted"):
                session.append(LOST)
        assert session.tokens <= len(session.token_ids) == 135
        assert go_on(session) == reached


def test_what_nobody_committed_is_not_appended_to(model, config) -> None:
    with Session.create("s", model, config) as session:
        first(session)
        session._forward(LOST)
        with pytest.raises(InputError, match="60 tokens that are not committed; call commit"):
            session.append(MORE)
        session.rollback()
        session.append(MORE)


@pytest.mark.parametrize("wrong", [[10**9], [5, 300], [-1], [5, 10**30], [1.5], ["a"]])
def test_token_ids_are_checked_before_anything_else(wrong, model, config) -> None:
    with Session.create("s", model, config) as session:
        first(session)
        before, files = session.token_ids, session.store.manifest
        ways: list[Callable[[], Any]] = [
            lambda: session.append(wrong),
            lambda: session.encode(wrong),
            lambda: session.share_prefix(wrong) or session.encode(wrong),
            lambda: session.commit([*before[:-1], *wrong][: len(before)]),
            lambda: Session.create("t", model, config, prompt=wrong),
        ]
        for number, way in enumerate(ways[:3] if len(wrong) > 1 else ways):
            with pytest.raises(InputError, match="token id"):
                way()
            assert (session.token_ids, session.store.manifest) == (before, files), number
        session.append([299])


def scaled(model: LoadedModel) -> list[float]:
    """A factor that every value of the first layer is multiplied with from now on."""
    factor = [1.0]
    module = model.model.model.layers[0].self_attn.v_proj
    module.register_forward_hook(lambda module, given, output: output * factor[0])
    return factor


@pytest.mark.parametrize("reopen", [False, True])
def test_stored_dtype_is_decided_once(reopen: bool, config) -> None:
    """Large values in a first prompt of less than a group, then ordinary ones: bits are read as what they are."""
    model = LoadedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), "tiny-llama")
    factor = scaled(model)
    session = Session.create("s", model, config.replace(select_tokens=400))
    factor[0] = 1e5
    session.append([7, 8, 9, 10])
    state = session.cache._state
    assert state is not None and state.pool.dtypes[0] == torch.bfloat16
    stored = state.pool.read_pinned(0, 0, 0, 1)[:, :, :3].clone()
    if reopen:
        session.close()
        session = Session.open("s", model, config.replace(select_tokens=400))
    factor[0] = 1.0
    session.append(MORE)
    state = session.cache._state
    assert state is not None and state.pool.dtypes == [torch.bfloat16, torch.float16, torch.float16]
    assert torch.equal(state.pool.read_pinned(0, 0, 0, 1)[:, :, :3], stored)
    session.close()


@pytest.mark.parametrize("count", [3, 70])
def test_larger_values_of_an_appended_prompt_stay_finite(count: int, config) -> None:
    model = LoadedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), "tiny-llama")
    factor = scaled(model)
    with Session.create("s", model, config) as session:
        session.append(tokens(1, 130)[0].tolist())
        factor[0] = 1e7
        session.append(tokens(1, count, seed=3)[0].tolist())
        factor[0] = 1.0
        state = session.cache._state
        assert state is not None and state.pool.dtypes[0] == torch.float16
        reader = state.store.read_tiles(0, 0, int(state.flushed[0, 0]), 64, torch.float16)
        assert all(bool(torch.isfinite(part).all()) for tile in reader for part in tile)
        reader.close()
        assert bool(torch.isfinite(state.pool.groups(0)[state.pool.first_pinned_slot(0, 0)]).all())
        session.append(MORE)
        assert len("".join(session.generate(max_new_tokens=4))) >= 0


def test_reads_that_fail_are_named_and_the_session_goes_on(model, config, monkeypatch) -> None:
    """In an append, a resumption and a decode step, from the first read, a later one, or one in between on."""
    real, count, broken = os.preadv, [0], [10**9]

    def preadv(*args: Any) -> int:
        if not threading.current_thread().name.startswith("kvswap-read"):  # a look at what the folder can do
            return real(*args)
        count[0] += 1
        if count[0] > broken[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    reached = [expected(model, config, None), expected(model, config, "append")]
    with Session.create("s", model, config) as session:
        first(session)
    ended = 0
    for start in (0, 1, 2, 4, 7, 11):
        count[0], broken[0] = 0, start
        with Session.open("s", model, config) as session:
            for kind in ("append", "generate"):
                try:
                    change(session, kind)
                except DiskReadError as error:
                    ended += 1
                    assert "EIO" in str(error)
                else:
                    count[0], broken[0] = 0, 10**9
                    session.undo()
                    count[0], broken[0] = 0, start
            broken[0] = 10**9
            session.fork(f"fork{start}")
        with Session.open(f"fork{start}", model, config) as session:
            assert go_on(session) in reached
    assert ended >= 6


@pytest.mark.parametrize(
    "change", [lambda session: session.append(MORE), lambda session: list(session.generate(max_new_tokens=3))]
)
def test_an_error_of_going_back_does_not_hide_the_first_one(
    model: LoadedModel, config: Config, monkeypatch, change
) -> None:
    def raises(text: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            raise DiskWriteError(text, hint="a test")

        return call

    with Session.create("s", model, config, prompt=tokens(1, 200)[0].tolist()) as session:
        before = session.token_ids
        with monkeypatch.context() as patch:
            patch.setattr(session.store, "commit", raises("the first error"))
            patch.setattr(session.store, "rollback", raises("the second error"))
            with pytest.raises(DiskWriteError, match="the first error") as caught:
                change(session)
        assert any("the second error" in note for note in caught.value.__notes__)
    with Session.open("s", model, config) as session:
        assert session.token_ids == before and check(session.store).problems == []
