"""The contents of a checkpoint: token ids, conversation, what is in no group on disk yet, and the index of groups.

``manifest.Checkpoint`` says where the contents are; ``SessionStore.load`` reads them. Pure: bytes in, values out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvswap.sessions.arrays import Arrays, damaged, decode_arrays, take
from kvswap.sessions.index import LayerIndex
from kvswap.sessions.manifest import Checkpoint, Counts, Layout

CONVERSATION_LIMIT_BYTES = 64 << 20


@dataclass(slots=True, kw_only=True)
class CheckpointContents:
    """What a checkpoint stores beside whole groups, checked against checksums and shapes.

    ``tail`` has the arrays of the file ``tail-C`` (docs/file-format.md). ``flushed`` counts whole groups on disk, by
    layer. ``groups`` is the index of these groups, empty where only the tail was asked for.
    """

    tokens: int
    flushed: Counts
    tail: Arrays
    groups: list[LayerIndex]

    @property
    def ids(self) -> list[int]:
        """Token ids: as many as ``tokens``, or one more."""
        ids: list[int] = self.tail["ids"].tolist()
        return ids

    @property
    def conversation(self) -> bytes:
        """The turns as JSON; empty without any."""
        found = self.tail.get("conversation")
        return b"" if found is None else bytes(found.tobytes())

    @property
    def has_sliding_layers(self) -> bool:
        """Whether the model has sliding-window layers. Their state cannot go back to an earlier token."""
        return any(name.startswith("sliding-") for name in self.tail)


def decode_tail(data: bytes, layout: Layout, checkpoint: Checkpoint, label: str) -> Arrays:
    """The arrays of a tail file, with the shapes that its checkpoint implies. Raises DamagedError."""
    file = f"{label}: {checkpoint.tail.file}"
    tail = decode_arrays(data, file)
    ids = take(tail, "ids", np.int64, file)
    if ids.size not in (checkpoint.tokens, checkpoint.tokens + 1) or bool((ids.astype(np.int64) < 0).any()):
        raise damaged(label, "the number of token ids does not match the number of tokens")
    token_bytes = layout.geometry.token_bytes
    for layer, groups in enumerate(checkpoint.flushed):
        waiting_bytes = (checkpoint.tokens - groups * layout.group_tokens) * token_bytes
        take(tail, f"waiting-{layer}", np.uint8, file, waiting_bytes)
    if "conversation" in tail and take(tail, "conversation", np.uint8, file).size > CONVERSATION_LIMIT_BYTES:
        raise damaged(label, "its conversation is too long")
    return tail


def replace_text(contents: CheckpointContents, ids: Sequence[int], conversation: bytes) -> Arrays:
    """The tail with other token ids, as many as tokens or one more, and another conversation."""
    if not contents.tokens <= len(ids) <= contents.tokens + 1:
        raise ValueError(f"{len(ids)} token ids for {contents.tokens} tokens")
    tail = {name: array for name, array in contents.tail.items() if name != "conversation"}
    tail["ids"] = np.array(ids, np.int64)
    return tail | ({"conversation": np.frombuffer(conversation, np.uint8)} if conversation else {})


def truncate_contents(
    layout: Layout, contents: CheckpointContents, groups: int, conversation: bytes = b""
) -> tuple[Counts, Arrays]:
    """``flushed`` and the tail of the first ``groups`` whole groups of a checkpoint, with another conversation."""
    tokens = groups * layout.group_tokens
    flushed = tuple(min(each, groups) for each in contents.flushed)
    tail: Arrays = {"ids": np.array(contents.ids[:tokens], np.int64)}
    if conversation:
        tail["conversation"] = np.frombuffer(conversation, np.uint8)
    for layer, (old, new) in enumerate(zip(contents.flushed, flushed, strict=True)):
        waiting = contents.tail[f"waiting-{layer}"].reshape(2 * layout.kv_heads, -1)
        kept_bytes = max(0, tokens - old * layout.group_tokens) * layout.head_dim * layout.geometry.itemsize_bytes
        if new != old and kept_bytes:
            raise ValueError(f"layer {layer}: {kept_bytes} bytes wait after {old} groups, not after {new}")
        tail[f"waiting-{layer}"] = waiting[:, :kept_bytes].reshape(-1)
    return flushed, tail
