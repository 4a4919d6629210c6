"""What every test stands on."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Shells start background jobs with SIGINT ignored, children inherit that, and tests of Ctrl-C would wait."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
