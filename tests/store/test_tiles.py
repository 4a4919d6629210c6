"""Streaming the stored groups of a layer: the right bytes in order, reads ahead, and memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvswap.disk import Faults, MemoryBackend
from kvswap.errors import DiskReadError
from kvswap.store.groups import GroupStore
from kvswap.store.layout import READ_AHEAD, TILE_BUFFERS, GroupLayout
from kvswap.store.tiles import TileMemory
from kvswap.terms import KVGeometry

GROUPS, HEADS, GROUP_TOKENS, HEAD_DIM = 53, 2, 4, 8


@pytest.fixture(params=[torch.float16, torch.float32])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def kv(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 2, HEADS, GROUPS * GROUP_TOKENS, HEAD_DIM).to(dtype)


@pytest.fixture
def store(backend: MemoryBackend, dtype: torch.dtype, kv: torch.Tensor) -> Iterator[GroupStore]:
    """Two layers with other content."""
    geometry = KVGeometry(kv_heads=HEADS, head_dim=HEAD_DIM, group_tokens=GROUP_TOKENS, itemsize_bytes=dtype.itemsize)
    layout = GroupLayout(geometry, max(512, backend.alignment_bytes))
    made = GroupStore(backend=backend, layout=layout, layers=2, batch=1, queue_bytes=1 << 20, groups=GROUPS)
    for layer in range(2):
        made.append(layer, 0, 0, kv[layer, 0], kv[layer, 1], dtype)
    made.writer.flush()
    yield made
    made.close()


@pytest.mark.parametrize("tile_groups", [1, 7, GROUPS, 1000])
@pytest.mark.parametrize(("first", "groups"), [(0, GROUPS), (5, GROUPS - 2), (9, 10), (4, 4)])
def test_tiles_are_what_was_stored_in_order(store, dtype, kv, tile_groups: int, first: int, groups: int) -> None:
    reader = store.read_tiles(1, 0, groups, tile_groups, dtype, first=first)
    tiles = [(keys.clone(), values.clone()) for keys, values in reader]
    reader.close()
    assert len(tiles) == -(-(groups - first) // tile_groups)
    cut = slice(first * GROUP_TOKENS, groups * GROUP_TOKENS)
    for part in (0, 1):
        found = torch.cat([tile[part] for tile in tiles], dim=1) if tiles else kv[1, part, :, :0].float()
        assert torch.equal(found.float(), kv[1, part, :, cut].float())


def test_reads_are_ahead_of_the_tile_in_use(store, dtype, backend) -> None:
    reader = store.read_tiles(0, 0, GROUPS, 10, dtype)
    reader.begin()
    assert len(reader._coming) == READ_AHEAD and not reader.all_begun
    for number, _ in enumerate(reader):
        assert len(reader._coming) == min(READ_AHEAD, 5 - number)
    assert reader.all_begun


def test_readers_share_memory_one_after_another(store, dtype, kv, monkeypatch) -> None:
    memory, made = TileMemory(), []
    slab = "kvswap.store.tiles.Slab"
    from kvswap.disk.slab import Slab

    monkeypatch.setattr(slab, lambda nbytes: made.append(Slab(nbytes)) or made[-1])
    following = store.read_tiles(0, 0, GROUPS, 6, dtype, memory=memory)
    for number in range(6):
        reader, following = following, store.read_tiles((number + 1) % 2, 0, GROUPS, 6, dtype, memory=memory)
        start = 0
        for keys, _ in reader:
            if reader.all_begun:
                following.begin()
            assert torch.equal(keys.float(), kv[number % 2, 0, :, start : start + keys.shape[1]].float())
            start += keys.shape[1]
        reader.close()
    following.close()
    memory.close()
    assert len(made) <= TILE_BUFFERS and all(each.nbytes == 0 for each in made)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_failed_reads_are_raised_and_the_others_waited_for(store, dtype, backend, failing: int) -> None:
    reader = store.read_tiles(0, 0, GROUPS, 5, dtype)
    with pytest.raises(DiskReadError):
        for number, _ in enumerate(reader):
            if number == failing:
                backend.faults = Faults(fail_reads=10**6)
    reader.close()
    assert not reader._coming and next(reader, None) is None
