"""Estimate what an evaluation will take, before it starts: time, memory and disk.

A few forwards are timed with full attention: of ``PROBE_TOKENS`` tokens and of one token, in an empty cache and behind
as many tokens as the longest prompt has (copies of a short one's keys and values). The time of prompts and steps
follows from that, where attention grows with the tokens before it. The estimate also weighs the progress of a run.
One thread, which must be the one that runs the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.layer_major import FullCache, Progress
from kvswap.lab.evals.measure import Shares
from kvswap.lab.evals.samples import Prompt, Sample
from kvswap.lab.evals.teacher_forcing import share_prompt
from kvswap.lab.evals.variants import Variant
from kvswap.lab.rivals.registry import DISK, with_methods
from kvswap.models.loading import LoadedModel
from kvswap.units import format_bytes, format_s

PROBE_TOKENS = 128
VARIANT_SHARE = 0.3
"""What a step of each further variant takes beside the shared products with the weights, as a share of those."""
FULL_COPIES = 2
"""The whole KV cache is in memory so many times: the prompt, and the cache of full attention that grows from it."""
STORED_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds of full attention, and bytes of its cache.

    ``token_s`` is for a token of a prompt, ``step_s`` for a decode step, both without tokens before; ``token_behind_s``
    and ``step_behind_s`` come for every token before. ``token_bytes`` are K and V of a token in all layers.
    """

    token_s: float
    token_behind_s: float
    step_s: float
    step_behind_s: float
    token_bytes: int
    element_bytes: int

    def prompt_s(self, known: int, tokens: int) -> float:
        """Seconds for the prompt tokens from number ``known`` up to ``tokens``."""
        return (tokens - known) * self.token_s + (tokens**2 - known**2) / 2 * self.token_behind_s

    def steps_s(self, count: int, tokens: int, variants: int) -> float:
        """Seconds for ``count`` decode steps of several variants at once behind ``tokens`` tokens."""
        shared = self.step_s * (1 + VARIANT_SHARE * (variants - 1))
        return count * (shared + tokens * self.step_behind_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Expected time, memory and disk for samples. ``parts_s`` has, for each, seconds of prompt, forced and answer."""

    parts_s: list[tuple[float, float, float]]
    prompt_tokens: int
    memory_bytes: int
    disk_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds in all."""
        return sum(map(sum, self.parts_s))

    def shares(self, number: int) -> Shares:
        """Return how the time of one sample is divided."""
        prompt_s, forced_s, answer_s = self.parts_s[number]
        whole_s = prompt_s + forced_s + answer_s
        return Shares(prompt_s / whole_s, forced_s / whole_s)

    def done(self, number: int, share: float) -> float:
        """Return the share of everything that is complete, where ``share`` of sample ``number`` is."""
        before_s = sum(map(sum, self.parts_s[:number]))
        return (before_s + share * sum(self.parts_s[number])) / self.total_s

    def sentence(self, samples: Sequence[Sample]) -> str:
        """Say what is to be done and what it takes."""
        return (
            f"{len(samples):,} samples to measure, {self.prompt_tokens:,} prompt tokens to compute: "
            f"about {format_s(self.total_s)}, {format_bytes(self.memory_bytes)} of memory beside the model and the "
            f"limits of the methods, {format_bytes(self.disk_bytes)} of disk"
        )


def estimate(
    rates: Rates, samples: Sequence[tuple[Sample, Sequence[Variant]]], known: Callable[[Prompt, Prompt], int]
) -> Estimate:
    """Estimate samples with their variants, in the order in which they run.

    ``known(prompt, before)`` counts the tokens of a prompt that need not be computed after the prompt before it. An
    answer is expected to be as long as the right one.
    """
    parts_s, computed, memory, disk, before = [], 0, 0, 0, Prompt()
    for sample, variants in samples:
        tokens, steps = len(sample.prompt), len(sample.forced)
        skipped = known(sample.prompt, before)
        steps_s = rates.steps_s(steps, tokens, len(variants))
        parts_s.append((rates.prompt_s(skipped, tokens), steps_s, steps_s if sample.answers else 0.0))
        computed += tokens - skipped
        whole_bytes = rates.token_bytes * (tokens + max(steps, sample.max_new_tokens))
        memory = max(memory, FULL_COPIES * whole_bytes)
        on_disk = sum(each.method in DISK for each in variants)
        disk = max(disk, on_disk * whole_bytes * STORED_ELEMENT_BYTES // rates.element_bytes)
        before = sample.prompt
    return Estimate(parts_s=parts_s, prompt_tokens=computed, memory_bytes=memory, disk_bytes=disk)


def measure_rates(
    loaded: LoadedModel,
    variants: Sequence[tuple[str, Config]],
    prompt: Prompt,
    *,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> Rates:
    """Time forwards with full attention, behind as many tokens as ``prompt`` has.

    ``variants`` are opened too, so that what they do once for a model, such as calibration, is done before a run.
    """
    first, config = list(prompt[:PROBE_TOKENS]), variants[0][1]
    with attach_each(
        loaded.model,
        with_methods([("full", config), ("full", config), *variants]),
        tokenizer=loaded.tokenizer,
        on_progress=lambda stage, done, total: None if stage == "prefill" else on_progress(stage, done, total),
        on_notice=on_notice,
    ) as (warm, cache, *_):
        assert isinstance(warm, FullCache)
        assert isinstance(cache, FullCache)
        _timed(loaded.model, warm, first)
        token_s, step_s = _timed(loaded.model, cache, first) / len(first), _timed(loaded.model, cache, first[:1])
        token_bytes = cache.stats.kv_full_bytes // cache.get_seq_length()
        _stretch(cache, len(prompt))
        far_token_s, far_step_s = (
            _timed(loaded.model, cache, first) / len(first),
            _timed(loaded.model, cache, first[:1]),
        )
    return Rates(
        token_s=token_s,
        token_behind_s=max(0.0, far_token_s - token_s) / len(prompt),
        step_s=step_s,
        step_behind_s=max(0.0, far_step_s - step_s) / len(prompt),
        token_bytes=token_bytes,
        element_bytes=loaded.model.dtype.itemsize,
    )


def _timed(model: Any, cache: FullCache, ids: list[int]) -> float:
    started_s = time.perf_counter()
    share_prompt(model, [cache], ids)
    return time.perf_counter() - started_s


def _stretch(cache: FullCache, tokens: int) -> None:
    """Make a cache as long as ``tokens`` tokens by repeating its keys and values."""
    for part, layer in zip(cache.parts.layers, cache.layers, strict=True):
        if part.order is not None:
            times = -(-tokens // layer.keys.shape[2])
            layer.keys, layer.values = (
                each.repeat(1, 1, times, 1)[:, :, :tokens] for each in (layer.keys, layer.values)
            )
        elif layer.is_sliding:
            layer.cumulative_length = tokens
