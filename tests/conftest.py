"""What every test stands on."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest

from kvswap.disk.files import IN_MEMORY, filesystem_of


def pytest_configure(config: pytest.Config) -> None:
    """Many systems keep the folder for temporary files in memory, which is no place for KV files: tests write here."""
    if config.option.basetemp is None and filesystem_of(tempfile.gettempdir()) in IN_MEMORY:
        config.option.basetemp = Path(config.rootpath, ".pytest_tmp")


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Shells start background jobs with SIGINT ignored, children inherit that, and tests of Ctrl-C would wait."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
