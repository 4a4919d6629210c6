"""Measure one sample with several variants: one shared prompt, then the same forced tokens for all variants.

Where the sample has answers, every variant also answers greedily. If a variant's most likely token was the forced one
at every step, the forced text is its greedy answer. The others answer from a second cache with the same prompt.

``evals.run`` calls this. One thread, which must be the one that runs the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of a sample's time for its prompt and its forced steps, 0 to 1; its answers are the rest."""

    prompt: float
    forced: float


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
    shares: Shares,
    on_fraction: Fraction,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> dict[Variant, Measured]:
    """Run one sample with all variants. The first variant must be ``FULL``; the others are compared with it.

    Parameters
    ----------
    settled
        ``settled(text)`` returns whether the score of an answer that begins with ``text`` is certain already.
    shares
        How the time of the sample is expected to be divided, for ``on_fraction``.
    on_fraction
        Called with the completed share of the sample, 0 to 1.
    on_progress
        Called with the stages that come before a sample, such as ``"calibrate"``.
    """
    if not variants or variants[0] != FULL:
        raise ValueError(f"the first of the variants {list(variants)} is not {FULL}")
    parts = inspect(loaded.model)
    elements = parts.kv_heads * parts.head_dim
    methods = {each: (each.method, each.configure(config, elements, sample.context)) for each in variants}

    def on_stage(stage: str, done: int, total: int) -> None:
        if stage != "prefill":
            return on_progress(stage, done, total)
        return on_fraction(shares.prompt * done / total)

    def attached(chosen: Sequence[Variant]) -> AbstractContextManager[list[Any]]:
        named = [("full", config), *(methods[each] for each in chosen)]
        told: dict[str, Any] = {"on_progress": on_stage, "on_notice": on_notice}
        return attach_each(loaded.model, with_methods(named), tokenizer=loaded.tokenizer, **told)

    with attached(variants) as (full, *caches):
        row = prompts.fill(loaded.model, full, sample.prompt)
        forced = dict(zip(variants, caches, strict=True))
        _adopt(caches, full)
        runs, masses = _force(loaded.model, forced, sample.forced, row, shares, on_fraction)
        stats = {each: cache.stats for each, cache in forced.items()}
    texts: dict[Variant, str | None] = dict.fromkeys(variants)
    if sample.answers:
        answers = _Answers(loaded, sample, settled)
        texts.update(answers.known(runs))
        rest = [each for each in variants if texts[each] is None]
        # A second attachment, so that memory and disk hold one cache of each variant at a time.
        with attached(rest) as (full, *caches):
            prompts.fill_again(full)
            _adopt(caches, full)
            texts.update(zip(rest, answers.generate(caches, row), strict=True))
    on_fraction(1.0)
    return {each: _measured(each, runs[each], texts[each], masses[each], stats[each]) for each in variants}


def _adopt(caches: Sequence[Any], full: Any) -> None:
    for cache in caches:
        cache.adopt(full)


def _force(
    model: Any,
    caches: Mapping[Variant, Any],
    ids: Sequence[int],
    row: torch.Tensor,
    shares: Shares,
    on_fraction: Fraction,
) -> tuple[dict[Variant, ForcedRun], dict[Variant, float | None]]:
    """Feed ``ids`` to all caches; return their runs, and the share of attention mass that the last step kept."""
    meters = {each: _meter(model, cache) for each, cache in caches.items()}

    def on_step(done: int, total: int) -> None:
        if done == total - 1:
            _remember(meters)  # the mass of the last step is measured after it
        on_fraction(shares.prompt + shares.forced * done / total)

    _remember(meters)
    runs = force_batched(model, caches, ids, row, on_step=on_step)
    masses: dict[Variant, float | None] = {
        each: None if meter is None else meter.mass(ids[-1]) for each, meter in meters.items()
    }
    return runs, masses | {FULL: 1.0}


class _Answers:
    """Greedy answers to one sample."""

    def __init__(self, loaded: LoadedModel, sample: Sample, settled: Callable[[str], bool]) -> None:
        self._loaded, self._sample, self._settled = loaded, sample, settled
        self._ends = set(end_tokens(loaded.model, loaded.tokenizer) or [])

    def known(self, runs: Mapping[Variant, ForcedRun]) -> dict[Variant, str]:
        """Return the answers of variants that would have written the forced tokens, and need not write them again."""
        forced = self._text_of(self._sample.forced)
        return {each: forced for each, run in runs.items() if all(run.expected) and self._settled(forced)}

    def generate(self, caches: Sequence[Any], row: torch.Tensor) -> list[str]:
        """Return the answer of each cache, all of which hold the prompt; ``row`` ``[V]`` is predicted after it."""
        if not caches:
            return []
        count = self._sample.max_new_tokens
        found = greedy_batched(self._loaded.model, caches, row, count, stops=self._stops)
        return [self._text_of(ids) for ids in found]

    def _stops(self, ids: list[int]) -> bool:
        return ids[-1] in self._ends or self._settled(self._text_of(ids))

    def _text_of(self, ids: Sequence[int]) -> str:
        kept = [token for token in ids if token not in self._ends]
        return str(self._loaded.tokenizer.decode(kept, skip_special_tokens=True))


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
