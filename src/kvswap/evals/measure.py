"""One sample through several methods at once: the prompt is computed once, then all take the same forced tokens.

Where answers are looked for, every method also generates its own, greedily, from a second cache of the same prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvswap.attachment import attach_each
from kvswap.cache import KVSwapCache
from kvswap.config import Config
from kvswap.errors import UnsupportedError
from kvswap.evals.forced import ForcedRun, force, greedy, share_prompt
from kvswap.evals.prompts import PromptShelf
from kvswap.evals.samples import Outcome, Sample
from kvswap.models.loading import LoadedModel
from kvswap.models.streaming import end_tokens
from kvswap.quality import QualityMeter
from kvswap.trace import CacheStats

Fraction = Callable[[float], None]
PROMPT_SHARE, STEPS_SHARE = 0.6, 0.39  # of a sample's progress; the rest is its end


@dataclass(frozen=True, slots=True)
class Variant:
    """A method under a memory limit; ``full`` has none."""

    method: str
    kv_memory: str | None

    @property
    def label(self) -> str:
        """A name that tells variants apart."""
        return self.method if self.kv_memory is None else f"{self.method} @ {self.kv_memory}"


FULL = Variant("full", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one variant did on one sample. KL and nll are means over tokens, in nats.

    ``mass``: the share of attention mass that the last forced step kept; None where that cannot be told.
    """

    outcome: Outcome
    kl: float
    mass: float | None
    step_s: float
    kv_memory_limit_bytes: int | None
    kv_memory_peak_bytes: int
    reuse_rate: float


def measure(
    loaded: LoadedModel,
    config: Config,
    variants: Sequence[Variant],
    sample: Sample,
    *,
    shelf: PromptShelf | None = None,
    on_fraction: Fraction,
    on_notice: Callable[[str], None],
) -> dict[Variant, Measured]:
    """Run a sample; the first variant is ``FULL``, which the others are compared with.

    ``shelf`` keeps computed prompts, for methods that are added later.
    """
    assert variants[0] == FULL
    wanted: list[Any] = [
        (each.method, config if each.kv_memory is None else config.replace(kv_memory=each.kv_memory))
        for each in variants
    ]
    generates = bool(sample.answers)
    watched: list[tuple[QualityMeter | None, Any]] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            on_fraction(PROMPT_SHARE * done / total)

    def on_step(done: int, total: int) -> None:
        if done == total - 1:
            _remember(watched)  # the last step's mass is measured
        on_fraction(PROMPT_SHARE + STEPS_SHARE * done / total / (2 if generates else 1))

    with attach_each(
        loaded.model,
        wanted * (2 if generates else 1),
        tokenizer=loaded.tokenizer,
        on_progress=on_progress,
        on_notice=on_notice,
    ) as caches:
        share = share_prompt if shelf is None else shelf.share
        row = share(loaded.model, caches, sample.prompt)
        forced = {each.label: cache for each, cache in zip(variants, caches, strict=False)}
        runs = {name: ForcedRun() for name in forced}
        watched += [(_meter(loaded.model, cache), cache) for cache in forced.values()]
        _remember(watched)
        force(loaded.model, forced, sample.forced, dict.fromkeys(forced, row), runs, on_step=on_step)
        masses = [1.0 if cache is caches[0] else _mass(meter, sample.forced[-1]) for meter, cache in watched]
        texts = _answers(loaded, sample, caches[len(variants) :], row) or [None] * len(variants)
        stats = [cache.stats for cache in caches]
    on_fraction(1.0)
    return {
        each: _measured(each, runs[each.label], text, mass, stat)
        for each, text, mass, stat in zip(variants, texts, masses, stats, strict=False)
    }


def _measured(variant: Variant, run: ForcedRun, text: str | None, mass: float | None, stats: CacheStats) -> Measured:
    nll, same = statistics.fmean([run.first_nll, *run.nll]), statistics.fmean(run.same)
    return Measured(
        outcome=Outcome(nll=nll, same=same, text=text),
        kl=statistics.fmean(run.kl),
        mass=mass,
        step_s=run.median_step_s,
        kv_memory_limit_bytes=None if variant == FULL else stats.kv_memory_limit_bytes,
        kv_memory_peak_bytes=stats.kv_memory_peak_bytes,
        reuse_rate=stats.reuse_rate,
    )


def _answers(loaded: LoadedModel, sample: Sample, caches: Sequence[Any], row: torch.Tensor) -> list[str | None]:
    """What each cache, which holds the prompt, goes on with."""
    ends = end_tokens(loaded.model, loaded.tokenizer) or []
    answers = (greedy(loaded.model, cache, row, sample.max_new_tokens, ends) for cache in caches)
    return [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def _meter(model: Any, cache: Any) -> QualityMeter | None:
    """A meter of what selection costs, where the method allows one."""
    if not isinstance(cache, KVSwapCache):
        return None
    try:
        return QualityMeter(model, cache)
    except UnsupportedError:
        return None


def _remember(watched: Sequence[tuple[QualityMeter | None, Any]]) -> None:
    for meter, _ in watched:
        if meter is not None:
            meter.remember()


def _mass(meter: QualityMeter | None, token: int) -> float | None:
    """Share of the mass of exact attention that the last step, of ``token``, attended to."""
    return None if meter is None else meter.mass(token)
