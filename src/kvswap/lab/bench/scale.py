"""How a decode step grows with the context, without a model: synthetic K, V in a model's geometry.

Store, sketch, prediction, planning, reads, slots and attention are the real ones, through the path that a model takes;
what is left out are the model's own layers. Queries drift from step to step, as those of text do. One thread.
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
from kvswap.core.decode import Decode
from kvswap.core.state import BatchState, Shape, open_state
from kvswap.core.trace import Trace
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
SPARE_BYTES = 2 << 30  # left free on the disk
DRIFT = 0.3  # share of a query that is new in each step
WARM_STEPS = 3  # the last writes of the fill end, memory is touched
PARTS = ("predict_s", "slots_s", "submit_s")


def kv_bytes(tokens: int, shape: Shape = SMOLLM2) -> int:
    """What the context takes on disk, without padding."""
    return tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim * shape.store_dtype.itemsize


def fits(tokens: int, config: Config, shape: Shape = SMOLLM2) -> bool:
    """Whether there is room for such a context on the disk, and something to spare."""
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
    """Fill a context of ``tokens`` (a multiple of G), then decode ``steps`` steps.

    Returns
    -------
    ``step_s``: every step. ``parts_s``: mean time of a step by part, ``attention_s`` and ``io_wait_s`` among them; the
    rest is ``other_s``. Memory as the ledger has it. Raises MemoryBudgetError, StorageError.
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
    """Seconds of each step, and those of attention in all of them."""
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


def plot_scale(rows: list[dict[str, Any]], target: Path) -> None:
    """Step time by part and memory per token, over the length of the context. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    steps, memory = figure.subplots(1, 2)
    names = [f"{row['tokens'] >> 10}K" for row in rows]
    for axes, values, factor in (
        (steps, [row["parts_s"] for row in rows], 1e3),
        (memory, [{k: v / row["tokens"] for k, v in row["memory_parts"].items()} for row in rows], 1.0),
    ):
        bottom = [0.0] * len(rows)
        for part in values[0]:
            heights = [factor * row[part] for row in values]
            axes.bar(names, heights, bottom=bottom, label=part.removesuffix("_s").replace("_", " "))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_xlabel("context, tokens")
        axes.legend(fontsize=7)
    steps.set_ylabel("a decode step without the model, ms")
    memory.set_ylabel("memory, bytes a token")
    figure.savefig(target, dpi=150)


def _open(tokens: int, config: Config, folder: Path, shape: Shape, generator: torch.Generator) -> BatchState:
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
    """Random K, V for a layer; tiles differ by a shift, so that groups do not repeat."""
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
    """K, V ``[2, H_kv, n, d]``; the elements of K have unequal variance, as those of models do."""
    kv = torch.randn(2, shape.kv_heads, tokens, shape.head_dim, generator=generator)
    kv[0] *= torch.linspace(2.0, 0.2, shape.head_dim)
    return kv
