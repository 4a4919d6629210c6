"""Measure what one model costs on this machine: the model's part of a profile.

Several caches with different settings decode the same short text, interleaved step by step. The engine itself measures
the parts of each step. Each part is then fitted as a linear function of the counts it depends on (``LinearCost``).

Scoring grows with the context, so it is timed separately over long contexts of random keys. These need no prefill, and
their codes cost as much to score as the codes of a text.

``profile.take_profile`` calls this. One thread, which must be the one that runs the model.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.cache import KVSwapCache
from kvswap.core.cache_stats import CacheStats
from kvswap.core.corpus import calibration_topics
from kvswap.models.adapter import ModelParts, cache_keyword, context_limit, inspect
from kvswap.models.identity import attention_fingerprint
from kvswap.models.loading import LoadedModel
from kvswap.selection.basis import Basis, KeyCovariance, identity_basis
from kvswap.selection.choose import top_groups
from kvswap.selection.kvswap import score
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.transform_sketch import TransformSketch, transform_basis
from kvswap.tuning.cost import LinearCost, ModelCosts, ModelFacts, PredictCost
from kvswap.tuning.measure_disk import Progress

PREFILL_S = 5.0
"""About how long the prefill of each cache may take."""
LEAST_TOKENS, MOST_TOKENS = 1024, 2048
WARM_STEPS, STEPS = 3, 15
SCORED_TOKENS = (1024, 4096, 16384)
_SKETCHES = 4
"""Sketches that are scored one after the other, so that none stays in the processor's cache as a whole."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """One cache's medians over steps, per layer: seconds of each part, and the counts that they depend on.

    ``parts_s["outside"]`` alone is that of the whole step.
    """

    parts_s: dict[str, float]
    counts: dict[str, float]


def measure_model(loaded: LoadedModel, kv_dir: str, *, on_progress: Progress | None) -> tuple[ModelFacts, ModelCosts]:
    """Run the model on calibration text and time it. Raises ModelError, StorageError, DiskError, MemoryBudgetError."""
    parts = inspect(loaded.model)
    report = on_progress or (lambda stage, done, total: None)
    ids = _text(loaded, MOST_TOKENS + WARM_STEPS + STEPS + 1)
    rate, warm = _prefill_rate(loaded, ids[:512], kv_dir), 1
    facts = model_facts(loaded, parts)
    most = min(MOST_TOKENS, (facts.longest_tokens or MOST_TOKENS) - WARM_STEPS - STEPS)
    tokens = min(most, int(np.clip(rate * PREFILL_S // 512 * 512, LEAST_TOKENS, MOST_TOKENS)))
    configs = run_settings(tokens, kv_dir)
    total = warm + len(configs) + WARM_STEPS + STEPS + len(SCORED_TOKENS)
    steps = itertools.count(warm + 1)
    report("model", warm, total)
    samples, rate = _samples(loaded, ids, tokens, configs, lambda: report("model", next(steps), total))
    predict = _score_costs(parts, lambda: report("model", min(next(steps), total), total))
    bare = ModelCosts(
        prefill_tokens_per_s=rate,
        outside_s=statistics.median(sample.parts_s["outside"] for sample in samples),
        query_s=0.0,
        compute=fit([sample.parts_s["compute"] for sample in samples], samples, ("attended",)),
        slots=fit([sample.parts_s["slots"] for sample in samples], samples, ("groups", "attended", "capacity")),
        submit=fit([sample.parts_s["submit"] for sample in samples], samples, ("reads",)),
        predict=predict,
    )
    elements = parts.kv_heads * parts.head_dim
    whole_s = _scoring_s(parts, tokens, LayerSketch, identity_basis(elements), 2)  # the sketch of the runs above
    query_s = max(0.0, statistics.median(sample.parts_s["predict"] for sample in samples) - whole_s)
    costs = replace(bare, query_s=query_s)
    logger.debug("measured %s on %d tokens, prefill %.0f tokens/s", facts.name, tokens, rate)
    return facts, costs


def model_facts(loaded: LoadedModel, parts: ModelParts) -> ModelFacts:
    """Return what a profile and tables record about a model."""
    itemsize = parts.dtype.itemsize
    return ModelFacts(
        name=loaded.short_name,
        fingerprint=attention_fingerprint(parts),
        layers=len(parts.offloaded),
        query_heads=parts.query_heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        compute_itemsize_bytes=itemsize,
        store_itemsize_bytes=2,
        longest_tokens=context_limit(parts.model) or 0,
        threads=torch.get_num_threads(),
    )


def run_settings(tokens: int, kv_dir: str) -> list[Config]:
    """Return settings that differ in group size, selection and reuse, so that the fit can separate their costs."""
    select = min(400, tokens // 3)
    base = Config(kv_dir=kv_dir, select_tokens=select, group_tokens=4)
    return [
        base,
        base.replace(group_tokens=1),
        base.replace(group_tokens=16),
        base.replace(select_tokens=max(100, select // 2)),
        base.replace(kv_memory="4GiB"),  # enough to keep every group
    ]


def fit(times_s: Sequence[float], samples: Sequence[Sample], names: tuple[str, ...]) -> LinearCost:
    """Fit ``times_s`` to the counts ``names`` by least squares with rates that are not negative.

    A count whose rate would be negative is left out and the rest fitted again, the most negative one first.
    """
    kept = list(names)
    while True:
        columns = [np.ones(len(samples)), *(np.array([s.counts[name] for s in samples]) for name in kept)]
        scale = [max(1e-12, float(np.abs(column).max())) for column in columns]
        matrix = np.stack([column / unit for column, unit in zip(columns, scale, strict=True)], axis=1)
        solution = np.linalg.lstsq(matrix, np.array(times_s), rcond=None)[0] / np.array(scale)
        rates = dict(zip(kept, (float(value) for value in solution[1:]), strict=True))
        if all(rate >= 0 for rate in rates.values()):
            return LinearCost(base_s=max(0.0, float(solution[0])), per={name: rates.get(name, 0.0) for name in names})
        kept.remove(min(rates, key=lambda name: rates[name]))


def _text(loaded: LoadedModel, count: int) -> list[int]:
    text = "\n\n".join(text for _, text in calibration_topics())
    ids: list[int] = loaded.tokenizer(text[: 12 * count], add_special_tokens=False)["input_ids"][:count]
    return ids


def _prefill_rate(loaded: LoadedModel, ids: list[int], kv_dir: str) -> float:
    """Prefill rate of a short prompt in tokens per second. It also warms up the model."""
    with attach_each(loaded.model, [(None, Config(kv_dir=kv_dir))]) as (cache,):
        _call(loaded.model, cache, ids[:256])
        began_s = time.perf_counter()
        _call(loaded.model, cache, ids[256:])
        return (len(ids) - 256) / (time.perf_counter() - began_s)


def _samples(
    loaded: LoadedModel, ids: list[int], tokens: int, configs: list[Config], report: Callable[[], None]
) -> tuple[list[Sample], float]:
    """Run all configurations interleaved; return a sample of each, and the prefill rate in tokens per second."""
    with attach_each(loaded.model, [(None, config) for config in configs]) as caches:
        rates = []
        for cache in caches:
            began_s = time.perf_counter()
            _call(loaded.model, cache, ids[:tokens])
            rates.append(tokens / (time.perf_counter() - began_s))
            report()
        steps_of: list[list[tuple[float, CacheStats, CacheStats]]] = [[] for _ in caches]
        for step, token in enumerate(ids[tokens : tokens + WARM_STEPS + STEPS]):
            for cache, steps in zip(caches, steps_of, strict=True):
                assert isinstance(cache, KVSwapCache)
                before, began_s = cache.stats, time.perf_counter()
                _call(loaded.model, cache, [token])
                if step >= WARM_STEPS:
                    steps.append((time.perf_counter() - began_s, before, cache.stats))
            report()
        samples = [_sample(cache, steps) for cache, steps in zip(caches, steps_of, strict=True)]
    return samples, statistics.median(rates)


def _sample(cache: Any, steps: list[tuple[float, CacheStats, CacheStats]]) -> Sample:
    """Medians over ``steps``: seconds of each step with the statistics before and after it."""
    layers, config = len(cache.parts.offloaded), cache.config

    def median(value: Callable[[float, CacheStats, CacheStats], float]) -> float:
        return statistics.median(value(*step) for step in steps)

    def part(name: str) -> float:
        return median(lambda _, before, after: getattr(after, name) - getattr(before, name)) / layers

    groups = part("selected_groups")
    times_s = {"predict": part("predict_s"), "slots": part("slots_s"), "submit": part("submit_s")}
    busy_s = sum(times_s.values()) + part("io_wait_s")
    times_s["outside"] = median(lambda step_s, before, after: step_s - (after.decode_s - before.decode_s))
    times_s["compute"] = part("decode_s") - busy_s
    counts = {
        "groups": groups,
        "attended": groups * config.group_tokens + config.pinned_tokens + config.group_tokens / 2,
        "reads": part("disk_reads"),
        "capacity": float(steps[-1][2].reuse_slots),
    }
    return Sample(times_s, counts)


@torch.no_grad()
def _call(model: Any, cache: Any, ids: list[int]) -> None:
    tokens = torch.tensor([ids], device=model.device)
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    output.logits[0, -1, :1].cpu()  # waits until the device has finished


def _score_costs(parts: ModelParts, report: Callable[[], None]) -> list[PredictCost]:
    """Time scoring for sketch sizes that span those the tuner considers."""
    elements = parts.kv_heads * parts.head_dim
    statistics = KeyCovariance(parts.kv_heads, parts.head_dim)
    statistics.add(torch.randn(4 * elements, parts.kv_heads, parts.head_dim))
    statistics.add_queries(torch.randn(parts.query_heads, elements, parts.head_dim))
    settings = [(max(8, elements // 8), 4), (max(8, elements // 2), 4), (max(8, elements // 4), 2), (elements, 2)]
    found = []
    for tokens in SCORED_TOKENS:
        for rank, bits in settings:
            cost_s = _scoring_s(parts, tokens, TransformSketch, transform_basis(statistics, rank, bits), bits)
            found.append(PredictCost(tokens=tokens, rank=rank, bits=bits, cost_s=cost_s))
        report()
    return found


def _scoring_s(parts: ModelParts, tokens: int, kind: type[LayerSketch], basis: Basis, bits: int) -> float:
    """Median seconds to score ``tokens`` random keys and choose groups."""
    keys = torch.randn(parts.kv_heads, tokens, parts.head_dim, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, parts.query_heads, parts.head_dim).to(parts.device, parts.dtype)
    sketches = [
        kind(
            batch=1,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            basis=basis,
            bits=bits,
            capacity_tokens=tokens,
            device=parts.device,
        )
        for _ in range(_SKETCHES)
    ]
    for sketch in sketches:
        sketch.append(0, keys.to(parts.device))
    return _time_scoring(sketches, query, parts.scaling)


def _time_scoring(sketches: list[LayerSketch], query: torch.Tensor, scaling: float) -> float:
    times_s, group_tokens = [], 4
    groups = int(sketches[0].tokens[0]) // group_tokens
    for number in range(5 * len(sketches)):
        began_s = time.perf_counter()
        scores = score(sketches[number % len(sketches)], query, scaling, group_tokens)
        top_groups(scores, 1, [groups], min(80, groups - 1)).cpu().numpy()
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)
