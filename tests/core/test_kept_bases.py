"""Bases that are kept equal those that are made, and a file that is not theirs is never used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvswap.core import kept_bases as module
from kvswap.core.kept_bases import kept_bases
from kvswap.selection.basis import Basis, KeyCovariance
from kvswap.selection.transform_sketch import transform_basis

KV_HEADS, HEAD_DIM, RANK, BITS = 2, 16, 16, 4
PARTS: Any = SimpleNamespace(kv_heads=KV_HEADS, head_dim=HEAD_DIM)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "LEAST_ELEMENTS", KV_HEADS * HEAD_DIM)
    monkeypatch.setattr(module, "attention_fingerprint", lambda parts: "f" * 64)
    return tmp_path / "home" / "calibration"


@pytest.fixture
def statistics() -> list[KeyCovariance]:
    return [measured(seed) for seed in range(3)]


def measured(seed: int) -> KeyCovariance:
    noise, found = torch.Generator().manual_seed(seed), KeyCovariance(KV_HEADS, HEAD_DIM)
    found.add(torch.randn(200, KV_HEADS, HEAD_DIM, generator=noise))
    found.add_queries(torch.randn(2 * KV_HEADS, 200, HEAD_DIM, generator=noise))
    return found


def refuse(*_: Any) -> Basis:
    raise AssertionError("a basis is made although all are kept")


def same(one: list[Basis], other: list[Basis]) -> bool:
    pairs = list(zip(one, other, strict=True))
    assert all(a.rows is not None and b.rows is not None for a, b in pairs)
    return all(torch.equal(a.joined(), b.joined()) and a.kind == b.kind and a.nbytes == b.nbytes for a, b in pairs)


def test_kept_ones_are_those_that_were_made(statistics: list[KeyCovariance], folder: Path) -> None:
    made = [transform_basis(each, RANK, BITS) for each in statistics]
    assert same(kept_bases(PARTS, statistics, RANK, BITS, transform_basis), made)
    assert [path.name for path in folder.iterdir()] == [f"{'f' * 24}-bases-16x4.safetensors"]
    assert same(kept_bases(PARTS, statistics, RANK, BITS, refuse), made)


def test_other_statistics_or_sizes_are_made(statistics: list[KeyCovariance]) -> None:
    kept_bases(PARTS, statistics, RANK, BITS, transform_basis)
    others = [*statistics[:2], measured(7)]
    for given, rank, bits in ((others, RANK, BITS), (statistics, 8, BITS), (statistics, RANK, 2)):
        made = [transform_basis(each, rank, bits) for each in given]
        assert same(kept_bases(PARTS, given, rank, bits, transform_basis), made)


@pytest.mark.parametrize("damage", ["cut", "shape", "infinite", "layer", "text"])
def test_a_damaged_file_is_made_anew(statistics: list[KeyCovariance], folder: Path, damage: str) -> None:
    made = kept_bases(PARTS, statistics, RANK, BITS, transform_basis)
    (path,) = folder.iterdir()
    whole, tensors = path.read_bytes(), load_file(path)
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "text":
        path.write_text("not a file of tensors")
    else:
        with module.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if damage == "shape":
            tensors["1"] = tensors["1"][:-1].clone()
        elif damage == "infinite":
            tensors["rows1"][0, 0] = torch.inf
        else:
            del tensors["2"]
        save_file(tensors, path, metadata=metadata)
    assert same(kept_bases(PARTS, statistics, RANK, BITS, transform_basis), made)
    assert path.read_bytes() == whole


def test_where_nothing_can_be_kept_they_are_made(
    statistics: list[KeyCovariance], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.write_text("a file where the folder would be")
    made = [transform_basis(each, RANK, BITS) for each in statistics]
    assert same(kept_bases(PARTS, statistics, RANK, BITS, transform_basis), made)
    monkeypatch.delenv("KVSWAP_HOME")
    monkeypatch.setattr(module, "calibration_folder", no_home)
    assert same(kept_bases(PARTS, statistics, RANK, BITS, transform_basis), made)


def no_home() -> Path:
    raise module.StorageError("this user has no home folder", hint="set one")


def test_small_keys_are_not_kept(
    statistics: list[KeyCovariance], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_ELEMENTS", KV_HEADS * HEAD_DIM + 1)
    kept_bases(PARTS, statistics, RANK, BITS, transform_basis)
    assert not folder.exists()
