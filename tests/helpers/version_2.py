"""A session of today as format version 2 had it: one data file a layer. Fixtures of that version prove it the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvswap.sessions.commits import SessionStore
from kvswap.sessions.manifest_json import encode
from kvswap.sessions.seal import text_sum


def make_version_2(folder: Path) -> None:
    """Rewrite a closed session in place. Files that it shares are left to the others; so nothing is owned any more."""
    with SessionStore.open(folder, write=False) as store:
        manifest, sign, layout = store.manifest, store.sealer.sign, store.manifest.layout
        segments = []
        for segment in manifest.segments:
            assert layout is not None
            for layer in range(layout.layers if segment.stripe_groups is not None else 0):
                data = b"".join(
                    store.folder.read(run.file, run.count * layout.slot_bytes, offset_bytes=run.offset_bytes)
                    for run in segment.runs(layout, layer, segment.start[layer], segment.high[layer], 1 << 20)
                )
                store.folder.write(f"data-{segment.number}-{layer}", data)
            segments.append(replace(segment, stripe_groups=None))
        names = {name for segment in manifest.segments for name in segment.names()}
        old = replace(manifest, segments=tuple(segments))
        store.folder.replace("manifest", as_version_2(encode(old, sign), sign))
        for name in names - set(old.files()):
            store.folder.remove(name)


def as_version_2(manifest: bytes, sign: Callable[[bytes], str]) -> bytes:
    """The text of a manifest without stripes, under the version that had none."""
    values = json.loads(manifest.partition(b"\n")[2])
    for segment in values["segments"]:
        assert segment.pop("stripe_groups") is None
    body = json.dumps(values, indent=1).encode()
    words = ("kvswap-session", "2", text_sum(body), sign(body))
    return f"{' '.join(word for word in words if word)}\n".encode() + body
