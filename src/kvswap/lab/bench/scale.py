"""Measure how a decode step grows with the context, without a model: synthetic K, V in a model's geometry.

Store, sketch, prediction, planning, reads, slots and attention are the real ones; only the model's own layers are left
out. Queries change gradually from step to step, as those of a text do. ``benchmarks/scale.py`` calls this. One thread.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from kvswap.config import Config
from kvswap.core.batch_state import BatchState, Shape, open_state
from kvswap.core.cache_stats import Trace
from kvswap.core.decode import Decode
from kvswap.disk import create_backend
from kvswap.disk.files import free_bytes, prepare_dir
from kvswap.disk.folders import kv_folder
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.kvswap import method as kvswap_method
from kvswap.selection.method import KeyFacts

SMOLLM2 = Shape(
    layers=30,
    query_heads=9,
    kv_heads=3,
    head_dim=64,
    scaling=0.125,
    dtype=torch.float32,
    store_dtype=torch.float16,
    device=torch.device("cpu"),
)
FILL_TILE_TOKENS = 8192
SPARE_BYTES = 2 << 30
"""Disk space that stays free."""
DRIFT = 0.3
"""Share of a query that is new in each step."""
WARM_STEPS = 3
"""Steps that are not counted: they let the last writes finish and touch memory."""
PARTS = ("predict_s", "slots_s", "submit_s")


def kv_bytes(tokens: int, shape: Shape = SMOLLM2) -> int:
    """Return the bytes of the context on disk, without padding."""
    return tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim * shape.store_dtype.itemsize


def fits(tokens: int, config: Config, shape: Shape = SMOLLM2) -> bool:
    """Return whether the disk has room for such a context and SPARE_BYTES more."""
    folder = prepare_dir(kv_folder(config.kv_dir))
    return kv_bytes(tokens, shape) + SPARE_BYTES <= free_bytes(folder)


def measure_scale(
    tokens: int,
    steps: int,
    config: Config,
    *,
    shape: Shape = SMOLLM2,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Fill a context of ``tokens`` tokens (a multiple of G), then decode ``steps`` steps.

    Returns
    -------
    Results ready for JSON. ``step_s`` has the seconds of every step. ``parts_s`` has the mean seconds of each part of a
    step; ``other_s`` is the rest. Memory is that of the ledger.

    Raises
    ------
    MemoryBudgetError, StorageError
    """
    folder = prepare_dir(kv_folder(config.kv_dir))
    generator = torch.Generator().manual_seed(0)
    state = _open(tokens, config, folder, shape, generator)
    try:
        started_s = time.perf_counter()
        for layer in range(shape.layers):
            _fill(state, layer, tokens, generator)
            on_progress("fill", layer + 1, shape.layers)
        fill_s = time.perf_counter() - started_s
        state.tokens[:] = tokens
        decode_steps(state, WARM_STEPS, generator)
        state.trace, counters = Trace(), state.store.backend.counters
        before = dataclasses.replace(counters)
        times, attention_s = decode_steps(state, steps, generator)
        parts = {name: getattr(state.trace, name) / steps for name in PARTS}
        parts |= {"io_wait_s": (counters.wait_s - before.wait_s) / steps, "attention_s": attention_s / steps}
        parts["other_s"] = statistics.fmean(times) - sum(parts.values())
        return {
            "tokens": tokens,
            "kv_bytes": kv_bytes(tokens, shape),
            "fill_s": fill_s,
            "step_s": times,
            "median_step_s": statistics.median(times),
            "parts_s": parts,
            "read_bytes_per_step": (counters.read_bytes - before.read_bytes) / steps,
            "reads_per_step": (counters.reads - before.reads) / steps,
            "reuse_rate": state.trace.reused_groups / max(1, state.trace.selected_groups),
            "kv_memory_limit_bytes": state.ledger.limit_bytes,
            "memory_parts": dict(state.ledger.reserved),
            "memory_bytes_per_token": state.ledger.reserved_bytes / tokens,
            "backend": state.store.backend.name,
            "direct_io": state.store.backend.direct,
        }
    finally:
        state.close()


def decode_steps(state: BatchState, steps: int, generator: torch.Generator) -> tuple[list[float], float]:
    """Decode ``steps`` steps; return the seconds of each step, and the seconds of attention in all of them."""
    shape, decode = state.shape, Decode(state)
    queries = torch.randn(shape.layers, 1, shape.query_heads, shape.head_dim, generator=generator)
    times, attention_s = [], 0.0
    for _ in range(steps):
        fresh = torch.randn(queries.shape, generator=generator)
        queries = (1 - DRIFT**2) ** 0.5 * queries + DRIFT * fresh
        new = torch.randn(2, 1, shape.kv_heads, 1, shape.head_dim, generator=generator)
        start_s = time.perf_counter()
        decode.begin_step()
        decode.prefetch(0, queries[0])
        for layer in range(shape.layers):
            if layer + 1 < shape.layers:
                decode.prefetch(layer + 1, queries[layer + 1])
            decode.put(layer, new[0], new[1])
            keys, values, mask = decode.collect(layer)
            before_s = time.perf_counter()
            functional.scaled_dot_product_attention(
                queries[layer][:, :, None], keys, values, attn_mask=mask, scale=shape.scaling, enable_gqa=True
            )
            attention_s += time.perf_counter() - before_s
        decode.end_step()
        times.append(time.perf_counter() - start_s)
    return times, attention_s


def _open(tokens: int, config: Config, folder: Path, shape: Shape, generator: torch.Generator) -> BatchState:
    """Open the state of an empty context, with a basis from random keys and queries."""
    method = kvswap_method()
    config = method.configure(config)
    covariances = []
    for _ in range(shape.layers):
        covariance = KeyCovariance(shape.kv_heads, shape.head_dim)
        covariance.add(_tile(FILL_TILE_TOKENS // 8, shape, generator)[0].transpose(0, 1))
        covariance.add_queries(
            torch.randn(shape.query_heads, FILL_TILE_TOKENS // 8, shape.head_dim, generator=generator)
        )
        covariances.append(covariance)
    facts = KeyFacts(
        layers=shape.layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=shape.device,
        statistics=covariances,
        rotate=lambda keys, positions, inverse: keys,
    )
    return open_state(
        config,
        method,
        shape,
        create_backend(config.backend, folder, config.read_depth, on_notice=lambda text: None),
        method.makers(facts, config),
        batch=1,
        tokens=tokens,
        trace=Trace(),
        check_space=lambda count_bytes: None,
    )


def _fill(state: BatchState, layer: int, tokens: int, generator: torch.Generator) -> None:
    """Append random K, V to a layer. Tiles are rotated and shifted copies of one, so that groups do not repeat."""
    group_tokens = state.window.group_tokens
    tile = _tile(min(tokens, FILL_TILE_TOKENS // group_tokens * group_tokens), state.shape, generator)
    start = 0
    while start < tokens:
        count = min(tile.shape[2], tokens - start)
        shifted = tile.roll(int(torch.randint(tile.shape[2], (1,), generator=generator)), dims=2)[:, :, :count]
        keys, values = shifted + 0.3 * torch.randn(
            2, state.shape.kv_heads, 1, state.shape.head_dim, generator=generator
        )
        if start == 0 or start + count == tokens:
            state.pin(layer, 0, keys, values, start // group_tokens)
        state.append(layer, 0, keys, values)
        start += count


def _tile(tokens: int, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Random K, V float32 ``[2, H_kv, n, d]``. The elements of K have unequal variance, as in real models."""
    kv = torch.randn(2, shape.kv_heads, tokens, shape.head_dim, generator=generator)
    kv[0] *= torch.linspace(2.0, 0.2, shape.head_dim)
    return kv
