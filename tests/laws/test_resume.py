"""Law 2: a schedule with close and reopen gives the same tokens as the same schedule without."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvswap.config import Config
from kvswap.errors import SessionError
from kvswap.models.gguf import PACKAGE
from kvswap.models.loading import LoadedModel, load_model
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer
from tests.helpers.version_2 import make_version_2

FAMILIES = ("llama", "gemma3")
REAL, CACHE_HOME = "smollm2-135m", os.environ.get("XDG_CACHE_HOME")
NUMBERS = itertools.count()
CONFIG = Config(select_tokens=56, recent_tokens=16, sink_tokens=4, kv_memory="4MiB")

# An operation, its size, and whether the session is closed and opened after it in the second run.
OPERATIONS = st.tuples(
    st.sampled_from(["append", "append", "generate", "generate", "undo", "fork", "align"]),
    st.integers(1, 130),
    st.booleans(),
)
SCHEDULES = st.lists(OPERATIONS, min_size=2, max_size=9)


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    """Calibrations are shared by the tests of this run and stay out of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@functools.cache
def loaded(family: str) -> LoadedModel:
    if family == REAL:
        return load_model(REAL, dtype="float32")
    return LoadedModel(tiny_model(family, vocab_size=300), byte_tokenizer(), f"tiny-{family}")


def play(
    family: str,
    schedule: list[tuple[str, int, bool]],
    kv_dir: Path,
    *,
    reopen: bool,
    encrypt: bool = False,
    between: Callable[[Path], None] = lambda folder: None,
) -> list[list[int]]:
    """Token ids after every operation. ``between`` is called with the session's folder while it is closed."""
    model, config, seen = loaded(family), CONFIG.replace(kv_dir=str(kv_dir)), []
    config = config.replace(kv_memory="auto") if family == REAL else config
    session = Session.create(f"s{next(NUMBERS)}", model, config, encrypt=encrypt)
    try:
        session.append(tokens(1, 190)[0].tolist())
        for number, (name, size, close) in enumerate(schedule):
            if name == "append":
                session.append(tokens(1, size, seed=number)[0].tolist())
            elif name == "generate":
                list(session.generate(max_new_tokens=1 + size % 14))
            elif name == "align":
                kept = session.token_ids[: max(1, len(session.token_ids) - size)]
                ids = [*kept, *tokens(1, 5, seed=number)[0].tolist()]
                session.truncate(session.common_tokens(ids))
                session.append(ids[len(session.token_ids) :])
            elif name == "fork":
                fork = f"s{next(NUMBERS)}"
                session.fork(fork)
                if size % 2:
                    session.close()
                    session = Session.open(fork, model, config)
            else:
                undo(session)
            seen.append(session.token_ids)
            if reopen and close:
                session.close()
                between(session.store.folder.path)
                session = Session.open(session.name, model, config)
            if not session.token_ids:
                session.append(tokens(1, 30, seed=77)[0].tolist())
    finally:
        session.close()
    return seen


def undo(session: Session) -> None:
    try:
        session.undo()
    except SessionError as error:
        assert "not kept" in str(error) or "nothing" in str(error)


def check(family: str, schedule: list[tuple[str, int, bool]], folder: Path) -> None:
    assert play(family, schedule, folder, reopen=True) == play(family, schedule, folder, reopen=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_close_and_reopen_change_nothing(family, tmp_path_factory) -> None:
    @settings(max_examples=4, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(SCHEDULES)
    def run(schedule: list[tuple[str, int, bool]]) -> None:
        check(family, schedule, tmp_path_factory.mktemp("law"))

    run()


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_session_of_version_2_goes_on_with_the_same_tokens(encrypt, tmp_path_factory, monkeypatch) -> None:
    """Whenever it is closed, its files become those of version 2: what is old and what is new lie side by side."""
    monkeypatch.setenv(KEY_VARIABLE, "5c" * 32)

    @settings(max_examples=3, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(SCHEDULES)
    def run(schedule: list[tuple[str, int, bool]]) -> None:
        one, two = (tmp_path_factory.mktemp("law") for _ in range(2))
        old = play("llama", schedule, one, reopen=True, encrypt=encrypt, between=make_version_2)
        assert old == play("llama", schedule, two, reopen=False, encrypt=encrypt)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_close_and_reopen_change_nothing_in_many_schedules(family, tmp_path_factory) -> None:
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(SCHEDULES)
    def run(schedule: list[tuple[str, int, bool]]) -> None:
        check(family, schedule, tmp_path_factory.mktemp("law"))

    run()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_close_and_reopen_change_nothing_with_smollm2(number, tmp_path, monkeypatch) -> None:
    """The same law on a real model, in a handful of schedules; its calibration is the user's, if there is one."""
    if CACHE_HOME is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", CACHE_HOME)
    if PACKAGE not in {each.name for each in distributions()}:
        pytest.skip(f"the package of {REAL} is not installed")
    dice = random.Random(number)
    names = ["append", "generate", "undo", "fork", "align"]
    check(REAL, [(dice.choice(names), dice.randint(1, 130), dice.random() < 0.5) for _ in range(7)], tmp_path)
