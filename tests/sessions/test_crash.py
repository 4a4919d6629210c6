"""A process with an open session is killed at random moments; afterwards the session is in a committed state."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sessions import crash_worker


@pytest.fixture(autouse=True)
def torch_threads() -> None:
    """One thread, as in the children, which are forked."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server() -> Any:
    """Makes children that have torch and the model already."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sessions.crash_worker"])
    return context


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where calibrations are cached: read once, by the reference run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def reference(home, tmp_path_factory) -> Iterator[tuple[list[list[int]], float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        first, _ = crash_worker.reference(tmp_path_factory.mktemp("first"))
        second, took_s = crash_worker.reference(tmp_path_factory.mktemp("second"))
        assert first == second
        yield first, took_s


def kill_and_recover(
    server: Any, home: Path, folder: Path, states: list[list[int]], after_s: float, *, encrypt: bool
) -> int | str:
    ours, theirs = server.Pipe()
    child = server.Process(target=crash_worker.run, args=(folder, home, encrypt, theirs))
    child.start()
    assert ours.recv() == "ready"
    time.sleep(after_s)
    child.kill()
    child.join()
    child = server.Process(target=crash_worker.recover, args=(folder, home, states, theirs))
    child.start()
    found: int | str = ours.recv()
    child.join()
    return found


def run_trials(
    server: Any,
    home: Path,
    folder: Path,
    reference: tuple[list[list[int]], float],
    trials: int,
    *,
    encrypt: Callable[[int], bool],
) -> None:
    states, took_s = reference
    dice, reached = random.Random(trials), []
    for number in range(trials):
        place = folder / str(number)
        place.mkdir()
        found = kill_and_recover(server, home, place, states, dice.uniform(0, 1.1 * took_s), encrypt=encrypt(number))
        assert isinstance(found, int), f"trial {number}: {found}"
        reached.append(found)
    assert len(set(reached)) > 1, "every kill hit the same place"


def test_after_a_kill_the_last_commit_is_there(server, home, tmp_path, reference) -> None:
    run_trials(server, home, tmp_path, reference, 6, encrypt=lambda number: number % 3 == 2)


@pytest.mark.slow
def test_after_many_kills_the_last_commit_is_there(server, home, tmp_path, reference) -> None:
    run_trials(server, home, tmp_path, reference, 300, encrypt=lambda number: False)


@pytest.mark.slow
def test_after_many_kills_the_last_commit_of_an_encrypted_session_is_there(server, home, tmp_path, reference) -> None:
    run_trials(server, home, tmp_path, reference, 300, encrypt=lambda number: True)
