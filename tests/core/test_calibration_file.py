"""A calibration file gives back what was saved, and a damaged one is never used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvswap.core.calibration import load_statistics, save_statistics
from kvswap.selection.basis import KeyCovariance

KV_HEADS, HEAD_DIM = 2, 16
IDENTITY = {"model": "tiny", "version": "1"}


def keys(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[Path, dict[int, KeyCovariance]]:
    statistics = {}
    for layer in (0, 3):
        statistics[layer] = KeyCovariance(KV_HEADS, HEAD_DIM)
        statistics[layer].add(keys(100, seed=layer).transpose(0, 1))
    path = tmp_path / "bases.safetensors"
    save_statistics(path, statistics, IDENTITY)
    return path, statistics


def test_calibration_comes_back(calibrated: tuple[Path, dict[int, KeyCovariance]]) -> None:
    path, statistics = calibrated
    found = load_statistics(path, IDENTITY)
    assert isinstance(found, dict)
    assert set(found) == {0, 3}
    for layer, loaded in found.items():
        before = statistics[layer]
        assert torch.allclose(loaded.matrix / loaded.count, before.matrix / before.count, rtol=1e-5)
        assert torch.allclose(loaded.total / loaded.count, before.total / before.count, rtol=1e-5)
        one, other = loaded.leading(16), statistics[layer].leading(16)
        assert torch.allclose(one @ one.T, other @ other.T, atol=1e-3)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_later_calibration_replaces_the_file(calibrated: tuple[Path, dict[int, KeyCovariance]]) -> None:
    path, statistics = calibrated
    save_statistics(path, {7: statistics[0]}, {"model": "other"})
    assert load_statistics(path, IDENTITY) == "calibration of another model or version"
    found = load_statistics(path, {"model": "other"})
    assert isinstance(found, dict)
    assert set(found) == {7}


def test_no_calibration_yet(tmp_path: Path) -> None:
    assert load_statistics(tmp_path / "none.safetensors", IDENTITY) == "no calibration yet"


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 40, 0.5, 0.999])
def test_truncated_calibration_is_refused(keep: float, calibrated: tuple[Path, dict[int, KeyCovariance]]) -> None:
    path, _ = calibrated
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    assert "damaged" in str(load_statistics(path, IDENTITY))


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    assert "damaged" in str(load_statistics(tmp_path, IDENTITY))


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"0": torch.ones(4, 5)}, None),
        ({"0": torch.ones(4)}, None),
        ({"0": torch.full((4, 4), float("nan"))}, None),
        ({"0": torch.full((4, 4), float("inf"))}, None),
        ({"zero": torch.ones(4, 4)}, None),
        ({"0": torch.ones(4, 4)}, "{"),
        ({"0": torch.ones(4, 4), "m0": torch.ones(4)}, None),
        ({"0": torch.ones(4, 4), "q0": torch.ones(2, 2, 2)}, None),
        ({"0": torch.ones(4, 4), "m0": torch.ones(3), "q0": torch.ones(2, 2, 2)}, None),
        ({"0": torch.ones(4, 4), "m0": torch.full((4,), float("nan")), "q0": torch.ones(2, 2, 2)}, None),
    ],
)
def test_senseless_calibration_is_refused(
    tensors: dict[str, torch.Tensor], metadata: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "bases.safetensors"
    save_file(tensors, path, metadata={"kvswap": json.dumps(IDENTITY) if metadata is None else metadata})
    assert "damaged" in str(load_statistics(path, IDENTITY))


@pytest.mark.parametrize("metadata", [None, {}, {"kvswap": "null"}, {"kvswap": "[]"}])
def test_calibration_of_nobody_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "bases.safetensors"
    save_file({"0": torch.ones(4, 4)}, path, metadata=metadata)
    assert load_statistics(path, IDENTITY) == "calibration of another model or version"
