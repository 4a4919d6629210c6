"""Whether weights fit is decided before they are loaded, of packed files and of checkpoints of floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvswap.errors import MemoryBudgetError
from kvswap.models.checkpoint_files import stored_bytes, weight_files
from kvswap.models.fitting import WeightNeeds, check_that_it_fits
from kvswap.models.loading import load_model
from tests.helpers.families import tiny_model
from tests.helpers.folders import save_tiny


def outcome(file_bytes: int, made_bytes: int, free_bytes: int, *, mmap: bool) -> str:
    notices: list[str] = []
    needs = WeightNeeds(file_bytes=file_bytes, made_bytes=made_bytes, why="when made", smaller="take others")
    try:
        check_that_it_fits("m", needs, mmap=mmap, free_bytes=free_bytes, notice=notices.append)
    except MemoryBudgetError as error:
        assert "\n" not in error.message and "take others" in error.hint and not notices
        return "refused"
    return "said" if notices else "fits"


def test_mapped_weights_need_not_fit_and_others_have_to():
    assert [outcome(100, 0, free, mmap=True) for free in (0, 99, 100)] == ["said", "said", "fits"]
    assert [outcome(0, 100, free, mmap=True) for free in (0, 99, 100)] == ["refused", "refused", "fits"]
    assert [outcome(50, 100, free, mmap=True) for free in (99, 100, 150)] == ["refused", "said", "fits"]
    assert [outcome(50, 100, free, mmap=False) for free in (100, 149, 150)] == ["refused", "refused", "fits"]


def test_sizes_are_those_of_the_files(tmp_path):
    folder = save_tiny(tmp_path / "m")
    count = sum(each.numel() for each in load_file(folder / "model.safetensors").values())
    assert stored_bytes(folder, torch.float32) == stored_bytes(folder, None) == (4 * count, 0)
    assert stored_bytes(folder, torch.float16) == (0, 2 * count)
    tiny_model("llama", vocab_size=259).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(weight_files(folder)) > 1
    assert stored_bytes(folder, torch.float32) == (4 * count, 0)
    (folder / "consolidated.safetensors").write_bytes(b"not looked at")
    assert stored_bytes(folder, torch.float32) == (4 * count, 0)
    weight_files(folder)[0].write_bytes(b"damaged")
    assert stored_bytes(folder, torch.float32) is None
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert stored_bytes(folder, torch.float32) is None
    assert stored_bytes(tmp_path, None) == (0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="weights go to the GPU")
def test_checkpoints_of_floats_are_checked_before_loading(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "m")
    size_bytes = stored_bytes(folder, None)[0]

    def load(free_bytes: int, name: Path = folder, **options: object) -> str:
        monkeypatch.setattr("kvswap.models.loading.available_bytes", lambda: free_bytes)
        notices: list[str] = []
        try:
            load_model(str(name), on_notice=notices.append, **options)
        except MemoryBudgetError as error:
            assert "--weights q8 or q4" in error.hint
            return error.message
        return notices[0] if notices else "fits"

    assert load(size_bytes) == "fits"
    assert "read some" not in load(size_bytes - 1) and "reads some of them from disk again" in load(size_bytes - 1)
    assert "memory are free" in load(size_bytes - 1, mmap=False)
    assert "when they are converted to float16" in load(size_bytes // 2 - 1, dtype="float16")
    assert load(size_bytes // 2, dtype="float16") == "fits"
    half = tmp_path / "half"
    save_tiny(half)
    tiny_model("llama", vocab_size=259).to(torch.bfloat16).save_pretrained(half)
    monkeypatch.setattr("kvswap.models.loading.has_bfloat16", lambda: False)
    assert "when they are converted to float32" in load(size_bytes - 1, half)
    monkeypatch.setattr("kvswap.models.loading.has_bfloat16", lambda: True)
    assert load(size_bytes // 2, half) == "fits"
