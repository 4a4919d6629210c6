from __future__ import annotations

import pytest
import torch

from kvswap.config import Config


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    """Bit-equality is about the order of sums; two threads on every machine."""
    torch.set_num_threads(2)


@pytest.fixture
def select_all(tmp_path) -> Config:
    """Everything is selected and stored without rounding: the engine must equal full attention."""
    return Config(select_tokens=6000, store_dtype="float32", kv_memory="128MiB", kv_dir=str(tmp_path / "kv"))
