"""The memory that a prompt needs while it is computed, checked before it starts. ``cache`` calls this."""

from __future__ import annotations

import torch

from kvswap.config import Config
from kvswap.core.batch_state import Shape
from kvswap.core.prefill import chunk_spans
from kvswap.errors import MemoryBudgetError
from kvswap.memory.available import available_bytes, device_available_bytes
from kvswap.memory.budget import PrefillNeeds
from kvswap.models.adapter import ModelParts
from kvswap.store.layout import tile_groups
from kvswap.units import format_bytes
from kvswap.weights.modules import passing_bytes


def prompt_needs(
    parts: ModelParts, shape: Shape, config: Config, hidden: torch.Tensor, implementation: str, *, appended: bool
) -> PrefillNeeds:
    """The needs of a prompt whose embeddings are ``hidden`` ``[B, T, E]``; ``appended`` to a stored context or not."""
    batch, tokens, elements = hidden.shape
    sliding = [parts.layer_kwargs[part.index] for part in parts.layers if part.order is None]
    return PrefillNeeds(
        batch=batch,
        tokens=tokens,
        chunk_tokens=max(stop - start for start, stop in chunk_spans(tokens, config.chunk_tokens)),
        hidden_elements=elements,
        inner_elements=getattr(parts.config, "intermediate_size", 4 * elements),
        query_heads=shape.query_heads,
        query_elements=shape.query_heads * shape.head_dim,
        key_elements=shape.kv_heads * shape.head_dim,
        itemsize_bytes=hidden.element_size(),
        eager=implementation == "eager",
        tile_bytes=_tile_bytes(shape, config.group_tokens, tokens) if appended else 0,
        ropes=len({part.layer_type for part in parts.layers}),
        sliding_tokens=sum(min(tokens, each.get("sliding_window") or 0) for each in sliding),
    )


def check_free_memory(needs: PrefillNeeds, parts: ModelParts, device: torch.device) -> tuple[int, bool]:
    """The temporary memory of a prompt in bytes, and whether a layer's packed weights stay unpacked for all its chunks.

    Raises MemoryBudgetError where less is free on ``device``, also with weights unpacked a panel at a time.
    """
    layer_bytes, panel_bytes = passing_bytes(part.module for part in parts.layers)
    transient_bytes = needs.transient_bytes() + layer_bytes
    free_bytes = available_bytes() if device.type == "cpu" else device_available_bytes(device)
    if free_bytes is None or transient_bytes <= free_bytes:
        return transient_bytes, True
    transient_bytes += panel_bytes - layer_bytes
    if transient_bytes > free_bytes:
        where = "memory" if device.type == "cpu" else f"the memory of {device}"
        raise MemoryBudgetError(
            f"prefill of {needs.batch * needs.tokens:,} tokens needs {format_bytes(transient_bytes)} temporarily, "
            f"{format_bytes(free_bytes)} of {where} are free",
            hint="close other programs, shorten the context, or lower chunk_tokens",
        )
    return transient_bytes, False


def _tile_bytes(shape: Shape, group_tokens: int, queries: int) -> int:
    """Bytes that are read at a time of what is stored, for a prompt of ``queries`` tokens."""
    slot_bytes = group_tokens * 2 * shape.kv_heads * shape.head_dim * shape.store_dtype.itemsize  # or a bit more
    return tile_groups(slot_bytes, group_tokens, queries=queries) * slot_bytes
