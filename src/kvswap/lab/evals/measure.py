"""One sample through several methods at once: the prompt is computed once, then all take the same forced tokens.

Where answers are looked for, every method also answers greedily. A method that would have said every forced token
itself has given its answer with that; the others answer from a second cache of the same prompt.
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
from kvswap.core.layer_major import Progress
from kvswap.core.trace import CacheStats
from kvswap.errors import UnsupportedError
from kvswap.lab.evals.forced import ForcedRun
from kvswap.lab.evals.panel import force_together, greedy_together
from kvswap.lab.evals.prompts import PromptShelf
from kvswap.lab.evals.samples import Outcome, Sample
from kvswap.lab.evals.settings import Setting
from kvswap.lab.rivals.registry import with_methods
from kvswap.models.adapter import inspect
from kvswap.models.loading import LoadedModel
from kvswap.models.streaming import end_tokens

Fraction = Callable[[float], None]
PROMPT_SHARE, STEPS_SHARE = 0.6, 0.2  # of a sample's progress; the rest is its answers


@dataclass(frozen=True, slots=True)
class Variant:
    """A method under a memory limit, with a setting of its sketch; ``full`` has neither."""

    method: str
    kv_memory: str | None = None
    setting: Setting | None = None

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        """What tells records of variants apart."""
        return self.method, self.kv_memory, None if self.setting is None else str(self.setting)

    def configure(self, config: Config, elements: int) -> Config:
        """Its configuration, for keys of ``elements`` elements (D)."""
        if self.kv_memory is not None:
            config = config.replace(kv_memory=self.kv_memory)
        return config if self.setting is None else self.setting.apply(config, elements)


FULL = Variant("full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one variant did on one sample. KL and nll are means over tokens, in nats.

    ``mass``: the share of attention mass that the last forced step kept; None where that cannot be told.
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
    shelf: PromptShelf,
    settled: Callable[[str], bool],
    on_fraction: Fraction,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> dict[Variant, Measured]:
    """Run a sample; the first variant is ``FULL``, which the others are compared with.

    ``settled(text)`` says whether an answer that begins with ``text`` need not go on. ``on_progress`` hears of what
    comes before the first sample, the calibration.
    """
    assert variants[0] == FULL
    parts = inspect(loaded.model)
    elements = parts.kv_heads * parts.head_dim
    wanted: list[Any] = [(each.method, each.configure(config, elements)) for each in variants]

    def on_stage(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            on_fraction(PROMPT_SHARE * done / total)
        else:
            on_progress(stage, done, total)

    with attach_each(
        loaded.model,
        with_methods([("full", config), *wanted, *(wanted if sample.answers else ())]),
        tokenizer=loaded.tokenizer,
        on_progress=on_stage,
        on_notice=on_notice,
    ) as (full, *caches):
        row = shelf.fill(loaded.model, full, sample.prompt)
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
    """All caches take ``ids``; with what each did, the share of attention mass that its last step kept."""
    meters = {each: _meter(model, cache) for each, cache in caches.items()}

    def on_step(done: int, total: int) -> None:
        if done == total - 1:
            _remember(meters)  # the last step's mass is measured
        on_fraction(PROMPT_SHARE + STEPS_SHARE * done / total)

    _remember(meters)
    runs = force_together(model, caches, ids, row, on_step=on_step)
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
    """What each variant answers; ``fresh`` are empty caches for those that have not said it while they were forced."""
    ends = set(end_tokens(loaded.model, loaded.tokenizer) or [])

    def text_of(ids: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True))

    def stops(ids: list[int]) -> bool:
        return ids[-1] in ends or settled(text_of(ids))

    right = text_of(sample.forced)
    found = {each: right for each, run in runs.items() if all(run.expected) and settled(right)}
    rest = {each: cache for each, cache in fresh.items() if each not in found}
    for cache in rest.values():
        cache.adopt(full)
    if rest:
        answers = greedy_together(loaded.model, list(rest.values()), row, sample.max_new_tokens, stops=stops)
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
    """A meter of what selection costs, where the method allows one."""
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
