"""What every test stands on."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from kvswap.config import Config
from kvswap.disk.files import IN_MEMORY, filesystem_of
from kvswap.memory.slots import SlotPool
from tests.helpers.folders import save_tiny

# A first example may wait for an import or for a busy machine; that is no failure.
settings.register_profile("kvswap", deadline=None)
settings.load_profile("kvswap")


def pytest_configure(config: pytest.Config) -> None:
    """Many systems keep the folder for temporary files in memory, which is no place for KV files: tests write here."""
    if config.option.basetemp is None and filesystem_of(tempfile.gettempdir()) in IN_MEMORY:
        config.option.basetemp = Path(config.rootpath, ".pytest_tmp")


STDERR = os.dup(2)  # the real one: pytest puts a file in its place
SLOW_S = 3600.0


@pytest.fixture(autouse=True)
def _slow_tests_may_be_slow(request: pytest.FixtureRequest) -> None:
    """A test that hangs is ended after ``faulthandler_timeout``, which no test that needs minutes would survive."""
    if request.node.get_closest_marker("slow"):
        faulthandler.dump_traceback_later(SLOW_S, exit=True, file=STDERR)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Shells start background jobs with SIGINT ignored, children inherit that, and tests of Ctrl-C would wait."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def torch_threads() -> None:
    """Bit-equality is about the order of sums; two threads on every machine."""
    torch.set_num_threads(2)


@pytest.fixture
def groups_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is not kept in memory as well, as under a tight limit, so that what is selected is read."""
    monkeypatch.setattr(SlotPool, "keeps_written", False)


@pytest.fixture
def select_all(tmp_path, groups_are_read) -> Config:
    """Everything is selected, read, and stored without rounding: the engine must equal full attention."""
    return Config(select_tokens=6000, store_dtype="float32", kv_memory="128MiB", kv_dir=str(tmp_path / "kv"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny model with a chat template."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.fixture
def cache_home(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of this test run, so that calibrations are shared and the user's stays as it is."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder
