from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.folders import save_tiny


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
