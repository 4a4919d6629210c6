"""Measure one sample with several variants: one shared prompt, then the same forced tokens for all variants.

Where the sample has answers, every variant also answers greedily. If a variant's most likely token was the forced one
at every step, the forced text is its greedy answer. The others answer from a second cache with the same prompt.

``evals.run`` calls this. One thread, which must be the one that runs the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvswap.app.quality import QualityMeter
from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.cache import KVSwapCache
from kvswap.core.cache_stats import CacheStats
from kvswap.core.layer_major import Progress
from kvswap.errors import UnsupportedError
from kvswap.lab.evals.cache_batch import force_batched, greedy_batched
from kvswap.lab.evals.prompt_cache import PromptCache
from kvswap.lab.evals.samples import Outcome, Sample
from kvswap.lab.evals.teacher_forcing import ForcedRun
from kvswap.lab.evals.variants import FULL, Variant
from kvswap.lab.rivals.registry import with_methods
from kvswap.models.adapter import inspect
from kvswap.models.loading import LoadedModel
from kvswap.models.streaming import end_tokens

Fraction = Callable[[float], None]
PROMPT_SHARE, STEPS_SHARE = 0.6, 0.2
"""Shares of a sample's progress for its prompt and its forced steps; its answers are the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Results of one variant on one sample. ``kl`` is the mean over steps, in nats.

    ``mass`` is the share of attention mass that the last forced step kept, or None where it cannot be measured.
    """

    outcome: Outcome
    kl: float
    mass: float | None
    kv_memory_limit_bytes: int | None
    kv_memory_peak_bytes: int
    sketch: str
    reuse_rate: float


def measure(
    loaded: LoadedModel,
    config: Config,
    variants: Sequence[Variant],
    sample: Sample,
    *,
    prompts: PromptCache,
    settled: Callable[[str], bool],
    on_fraction: Fraction,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> dict[Variant, Measured]:
    """Run one sample with all variants. The first variant must be ``FULL``; the others are compared with it.

    Parameters
    ----------
    settled
        ``settled(text)`` returns whether the score of an answer that begins with ``text`` is certain already.
    on_fraction
        Called with the completed share of the sample, 0 to 1.
    on_progress
        Called with the stages that come before a sample, such as ``"calibrate"``.
    """
    if not variants or variants[0] != FULL:
        raise ValueError(f"the first of the variants {list(variants)} is not {FULL}")
    parts = inspect(loaded.model)
    elements = parts.kv_heads * parts.head_dim
    methods: list[Any] = [(each.method, each.configure(config, elements, sample.context)) for each in variants]

    def on_stage(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            on_fraction(PROMPT_SHARE * done / total)
        else:
            on_progress(stage, done, total)

    with attach_each(
        loaded.model,
        with_methods([("full", config), *methods, *(methods if sample.answers else ())]),
        tokenizer=loaded.tokenizer,
        on_progress=on_stage,
        on_notice=on_notice,
    ) as (full, *caches):
        row = prompts.fill(loaded.model, full, sample.prompt)
        forced = dict(zip(variants, caches, strict=False))
        for cache in forced.values():
            cache.adopt(full)
        runs, masses = _force(loaded.model, forced, sample.forced, row, on_fraction)
        texts: dict[Variant, str | None] = dict.fromkeys(variants)
        if sample.answers:
            fresh = dict(zip(variants, caches[len(variants) :], strict=True))
            texts.update(_answers(loaded, sample, full, runs, fresh, row, settled))
        stats = {each: cache.stats for each, cache in forced.items()}
    on_fraction(1.0)
    return {each: _measured(each, runs[each], texts[each], masses[each], stats[each]) for each in variants}


def _force(
    model: Any, caches: Mapping[Variant, Any], ids: Sequence[int], row: torch.Tensor, on_fraction: Fraction
) -> tuple[dict[Variant, ForcedRun], dict[Variant, float | None]]:
    """Feed ``ids`` to all caches; return their runs, and the share of attention mass that the last step kept."""
    meters = {each: _meter(model, cache) for each, cache in caches.items()}

    def on_step(done: int, total: int) -> None:
        if done == total - 1:
            _remember(meters)  # the mass of the last step is measured after it
        on_fraction(PROMPT_SHARE + STEPS_SHARE * done / total)

    _remember(meters)
    runs = force_batched(model, caches, ids, row, on_step=on_step)
    masses: dict[Variant, float | None] = {
        each: None if meter is None else meter.mass(ids[-1]) for each, meter in meters.items()
    }
    return runs, masses | {FULL: 1.0}


def _answers(
    loaded: LoadedModel,
    sample: Sample,
    full: Any,
    runs: Mapping[Variant, ForcedRun],
    fresh: Mapping[Variant, Any],
    row: torch.Tensor,
    settled: Callable[[str], bool],
) -> dict[Variant, str]:
    """Return each variant's greedy answer. ``fresh`` are empty caches for those whose answer is not known yet."""
    ends = set(end_tokens(loaded.model, loaded.tokenizer) or [])

    def text_of(ids: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True))

    def stops(ids: list[int]) -> bool:
        return ids[-1] in ends or settled(text_of(ids))

    forced = text_of(sample.forced)
    found = {each: forced for each, run in runs.items() if all(run.expected) and settled(forced)}
    rest = {each: cache for each, cache in fresh.items() if each not in found}
    for cache in rest.values():
        cache.adopt(full)
    if rest:
        answers = greedy_batched(loaded.model, list(rest.values()), row, sample.max_new_tokens, stops=stops)
        found |= {each: text_of(ids) for each, ids in zip(rest, answers, strict=True)}
    return found


def _measured(variant: Variant, run: ForcedRun, text: str | None, mass: float | None, stats: CacheStats) -> Measured:
    return Measured(
        outcome=Outcome(nll=statistics.fmean([run.first_nll, *run.nll]), same=statistics.fmean(run.same), text=text),
        kl=statistics.fmean(run.kl),
        mass=mass,
        kv_memory_limit_bytes=None if variant == FULL else stats.kv_memory_limit_bytes,
        kv_memory_peak_bytes=stats.kv_memory_peak_bytes,
        sketch=stats.sketch,
        reuse_rate=stats.reuse_rate,
    )


def _meter(model: Any, cache: Any) -> QualityMeter | None:
    """Return a meter of the attention mass that a cache keeps, or None where its method allows none."""
    if not isinstance(cache, KVSwapCache):
        return None
    try:
        return QualityMeter(model, cache)
    except UnsupportedError:
        return None


def _remember(meters: Mapping[Variant, QualityMeter | None]) -> None:
    for meter in meters.values():
        if meter is not None:
            meter.remember()
