"""Where groups are in the files of a session, for tests that damage one."""

from __future__ import annotations

from pathlib import Path

from kvswap.sessions.commits import SessionStore


def place_of_group(folder: Path, layer: int, share: float = 0.6) -> tuple[Path, int, int]:
    """File, offset and length in bytes of a group: ``share`` of those of the layer's first segment are before it."""
    with SessionStore.open(folder, write=False, check_files=False) as store:
        segment, layout = store.manifest.segments[0], store.manifest.layout
        assert layout is not None
        start, high = segment.start[layer], segment.high[layer]
        group = start + int((high - start) * share)
        (run,) = segment.runs(layout, layer, group, group + 1, layout.slot_bytes)
        return folder / run.file, run.offset_bytes, layout.slot_bytes


def damage_group(folder: Path, layer: int, share: float = 0.6) -> None:
    """Change one bit of a group."""
    file, offset_bytes, _ = place_of_group(folder, layer, share)
    data = bytearray(file.read_bytes())
    data[offset_bytes] ^= 1
    file.write_bytes(data)
