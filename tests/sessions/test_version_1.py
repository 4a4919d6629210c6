"""A session of format version 1, as an earlier kvswap exported it, is read, continued, and becomes one of today's."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kvswap.selection.basis import Basis
from kvswap.selection.transform_sketch import full_precision_basis
from kvswap.sessions.check import check
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.export_import import import_session
from kvswap.sessions.index import LayerIndex

ARCHIVE = Path(__file__).with_name("session-v1.kvswap")
SUMS = [9296889317656033521, 1532985518080010198]  # of all checksums of a layer, as they were written
CODES = [15887, 15494]


@pytest.fixture
def old(tmp_path) -> Path:
    """The session as version 1 had it on disk."""
    path = tmp_path / "old"
    path.mkdir(mode=0o700)
    with tarfile.open(ARCHIVE) as archive:
        for member in archive.getmembers():
            (path / member.name).write_bytes(archive.extractfile(member).read())
            (path / member.name).chmod(0o600)
    assert (path / "manifest").read_bytes().startswith(b"kvswap-session 1 ")
    return path


def test_it_is_read_as_it_was_written(old) -> None:
    with SessionStore.open(old, write=False) as store:
        stored = store.load()
        assert store.manifest.encryption is None and store.manifest.layout.sketch_kind == "transform"
        assert stored.tokens == 35 and len(stored.ids) == 36 and stored.conversation == b'["hello"]'
        assert [int(layer.seals.sum()) for layer in stored.groups] == SUMS
        assert [int(layer.codes.sum()) for layer in stored.groups] == CODES
        assert [layer.scales.shape for layer in stored.groups] == [(0, 32)] * 2
        assert check(store).problems == []


def test_its_basis_becomes_one_of_today(old) -> None:
    with SessionStore.open(old, write=False) as store:
        for matrix in store.basis():
            assert matrix.shape == (2 * 16 + 3, 8)
            basis = full_precision_basis(torch.from_numpy(matrix.copy()))
            again = Basis.split(basis.joined(), "transform")
            assert torch.equal(again.matrix, basis.matrix) and torch.equal(again.rows, basis.rows)
            encode, decode = (basis.matrix.float() * basis.rows[:2].repeat_interleave(16, 0)).chunk(2)
            for found, wanted in ((encode, matrix[:16]), (decode, matrix[16:32])):
                assert np.allclose(found.numpy(), wanted, atol=1e-3)
            assert np.array_equal(basis.rows[2:].numpy(), matrix[32:])


def test_it_is_continued_and_its_old_batches_stay(old) -> None:
    with SessionStore.open(old, write=True) as store:
        stored, manifest = store.load(), store.manifest
        layout, first = manifest.layout, manifest.current.flushed[0]
        assert not store.appendable()
        segment, layers = store.begin_segment((first,) * layout.layers, 16), []
        store.sealer.begin()
        file = store.open_data(*segment.names(), direct=False)
        for layer in range(layout.layers):
            slots = np.full((1, layout.slot_bytes), layer + 1, np.uint8)
            slots[:, layout.geometry.group_bytes :] = 0
            os.pwrite(file, slots.tobytes(), layer * 16 * layout.slot_bytes)
            seals = store.sealer.seal(layer, first, slots[:, : layout.geometry.group_bytes])
            codes = np.ones((layout.code_rows, layout.group_tokens), np.uint8)
            layers.append(LayerIndex(seals, codes, np.empty((0, layout.group_tokens), np.uint16)))
        os.close(file)
        store.commit(
            model=manifest.model,
            layout=layout,
            basis=None,
            tokens=stored.tokens + layout.group_tokens,
            flushed=(first + 1,) * layout.layers,
            new_groups=layers,
            tail={**stored.tail, "ids": np.arange(stored.tokens + layout.group_tokens)},
            data_bytes=0,
            interim=False,
        )
    assert (old / "manifest").read_bytes().startswith(b"kvswap-session 3 ")
    with SessionStore.open(old, write=False) as store:
        found = store.load()
        assert check(store).problems == []
        assert [int(layer.codes.sum()) - layer.codes.shape[0] * layout.group_tokens for layer in found.groups] == CODES


def test_its_archive_is_imported(tmp_path) -> None:
    import_session(ARCHIVE, tmp_path / "new")
    with SessionStore.open(tmp_path / "new", write=False) as store:
        assert store.load().tokens == 35
    assert (tmp_path / "new" / "manifest").read_bytes().startswith(b"kvswap-session 3 ")
