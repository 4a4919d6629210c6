"""Search the parameters for a memory limit: price every combination and choose the best.

The search follows KVSwap (arXiv 2511.11907, section 3.5 and appendix A). Its inputs are a profile of disk and model,
tables of quality and selections, the memory limit, the context and the batch. The paper starts from the smallest group
and searches step by step; here the combinations are few enough to price all of them.

To *price* a configuration means to predict its step time, its KL to full attention and its memory. Memory that the
limit leaves after sketch, pinned groups and staging becomes reuse slots, if they save more time than they cost. The gap
across which reads are merged is chosen afterwards, for the best few candidates only.

``tune.tune`` calls ``search``. Nothing is measured here. One thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from kvswap.config import Config
from kvswap.core.attach import UNKNOWN_SHARE, share_for
from kvswap.errors import MemoryBudgetError
from kvswap.memory.budget import OWNER_BYTES, MemoryNeeds, capacity_for
from kvswap.selection.method import window_of
from kvswap.selection.transform_sketch import TransformSketch, basis_bytes
from kvswap.selection.window import Window
from kvswap.store.layout import GroupLayout
from kvswap.terms import KVGeometry, ceil_div
from kvswap.tuning.cost import ModelFacts, StepCost, Traffic, step_cost
from kvswap.tuning.profile import Profile
from kvswap.tuning.tables import GROUPS, SketchSize, Tables, groups_by_layer, sketch_sizes
from kvswap.tuning.traffic import simulate
from kvswap.units import KIB, format_bytes, format_parts

Prefer = Literal["quality", "speed"]

TIME_SLACK = 1.05
"""With ``prefer="quality"``: choose the best KL among candidates at most this many times as slow as the fastest."""
KL_SLACK = 2.5
"""With ``prefer="speed"``: choose the fastest among candidates with at most this many times the best KL.

The defaults have about 1.7 times the best.
"""
GAPS_BYTES = (32 * KIB, 64 * KIB)
"""Read gaps that are tried besides the default. They help where one request costs the time of many bytes."""
FINALISTS = 4
"""Number of best candidates for which the gap is chosen."""
LEAST_GAIN = 0.01
"""Least share of a step that a longer gap must save, because it makes the disk read more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration with its price.

    ``expected_kl`` is the predicted mean over texts; nine of ten texts are expected to stay below ``kl_bound``.
    ``memory_parts`` are bytes by part.
    """

    config: Config
    sketch: SketchSize
    by_layer: bool
    reuse_slots: int
    traffic: Traffic
    cost: StepCost
    expected_kl: float
    kl_bound: float
    memory_parts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to tune for: a memory limit, a context, a batch, and M (``select_tokens``) as the mean over layers.

    M of None is that of the untuned default on this disk, within the memory limit.
    """

    limit_bytes: int
    context_tokens: int
    batch: int
    select_tokens: int | None


class Pricing:
    """Prices configurations of one model on one machine. ``profile`` must have model costs. Simulations are cached."""

    def __init__(self, profile: Profile, tables: Tables, facts: ModelFacts, device: torch.device) -> None:
        if profile.costs is None:
            raise ValueError("a profile without model costs")
        self.profile, self.tables, self.facts, self._device = profile, tables, facts, device
        self._costs = profile.costs
        self._simulate = lru_cache(maxsize=None)(self._simulated)

    def needs(self, config: Config, batch: int) -> MemoryNeeds:
        """Return the memory needs of a configuration, by the same arithmetic as when a cache is opened."""
        facts, rank, bits = self.facts, config.sketch_rank or 0, config.sketch_bits
        layout = self._layout(group_tokens := config.group_tokens)
        return MemoryNeeds(
            layers=facts.layers,
            batch=batch,
            scoring_token_bytes=TransformSketch.scratch_bytes(
                rank, bits, facts.query_heads, self._device, group_tokens
            ),
            window=Window(config.group_tokens, config.sink_groups, config.recent_groups, config.select_groups),
            slot_bytes=layout.slot_bytes,
            token_bytes=layout.geometry.token_bytes,
            compute_itemsize_bytes=facts.compute_itemsize_bytes,
            store_itemsize_bytes=facts.store_itemsize_bytes,
            sketch_token_bytes=TransformSketch.token_bytes(rank, bits),
            basis_bytes=facts.layers * basis_bytes(facts.key_elements, rank),
        )

    def select_tokens(self, config: Config, request: Request) -> int:
        """M of a request for a configuration: the given one, or what a selection that grows has at its context."""
        if request.select_tokens is not None:
            return request.select_tokens
        disk = self.profile.disk
        share = share_for(disk.small_reads_per_s()) if disk.direct_io else UNKNOWN_SHARE
        grows = config.replace(select_tokens="auto")
        needs = self.needs(grows, request.batch)
        needs = replace(needs, window=replace(window_of(grows, self.facts.kv_heads), share=share))
        groups = needs.select_groups(request.context_tokens, request.limit_bytes)
        return config.pinned_tokens + groups * config.group_tokens

    def layer_select_tokens(self, config: Config, context_tokens: int) -> tuple[int, ...]:
        """Distribute the selected tokens over layers by the attention mass they keep, with the same mean.

        Empty where more groups are selected than the tables rank.
        """
        context = self.tables.nearest_context(context_tokens)
        kept = self.tables.kept[context, config.group_tokens]
        if config.select_groups > kept.shape[1] - 1 and context < context_tokens:
            return ()
        groups = groups_by_layer(kept, min(config.select_groups, kept.shape[1] - 1))
        return tuple(config.pinned_tokens + count * config.group_tokens for count in groups)

    def cheapest(self, config: Config, request: Request) -> Candidate | None:
        """Price a configuration with all spare memory as reuse slots and with none, and return the faster one.

        Many slots cost processor time, which they do not save on a fast disk. Returns None where the configuration
        does not fit the limit.
        """
        with_reuse = self.price(config, request)
        if with_reuse is None or with_reuse.reuse_slots == 0:
            return with_reuse
        least = self.needs(config, request.batch).minimum_bytes(request.context_tokens)
        without = self.price(config.replace(kv_memory=least), replace(request, limit_bytes=least))
        return without if without is not None and without.cost.step_s < with_reuse.cost.step_s else with_reuse

    def price(self, config: Config, request: Request) -> Candidate | None:
        """Price a configuration whose ``sketch_rank`` is set. Returns None where it does not fit the limit."""
        needs = self.needs(config, request.batch)
        capacity = capacity_for(request.context_tokens)
        parts = needs.parts(capacity)
        free = request.limit_bytes - sum(parts.values())
        if free < 0:
            return None
        slots = needs.reuse_slots(capacity, free)
        parts["slots"] = slots * needs.slot_bytes
        parts["tables"] += slots * OWNER_BYTES
        traffic, cost = self.step(config, request.context_tokens, slots, request.batch)
        sketch = SketchSize(config.sketch_rank or 0, config.sketch_bits)
        by_layer = config.layer_select_tokens is not None
        kl = self.tables.kl(
            request.context_tokens, sketch, config.group_tokens, config.least_select_tokens, by_layer=by_layer
        )
        return Candidate(
            config=config,
            sketch=sketch,
            by_layer=by_layer,
            reuse_slots=slots,
            traffic=traffic,
            cost=cost,
            expected_kl=kl.expected,
            kl_bound=kl.bound,
            memory_parts=parts,
        )

    def step(self, config: Config, context_tokens: int, reuse_slots: int, batch: int = 1) -> tuple[Traffic, StepCost]:
        """Predict the traffic of one sequence and the cost of a step of the batch, whose sequences share the slots."""
        context = self.tables.nearest_context(context_tokens)
        width = self.tables.rankings[context, config.group_tokens].shape[3]
        groups = tuple(min(width, count) for count in config.layer_select_groups(self.facts.layers))
        slots = _two_digits(reuse_slots // batch)
        traffic = self._simulate(context, config.group_tokens, groups, slots, config.read_gap_bytes)
        cost = step_cost(
            self._costs,
            self.profile.disk,
            traffic if batch == 1 else _times(traffic, batch),
            tokens=context_tokens * batch,
            pinned_tokens=batch * (config.pinned_tokens + config.group_tokens / 2),
            group_tokens=config.group_tokens,
            rank=config.sketch_rank or 0,
            bits=config.sketch_bits,
            reuse_slots=reuse_slots,
        )
        return traffic, cost

    def _simulated(
        self, context: int, group_tokens: int, groups: tuple[int, ...], reuse_slots: int, gap_bytes: int
    ) -> Traffic:
        return simulate(
            self.tables.rankings[context, group_tokens],
            list(groups),
            reuse_slots=reuse_slots,
            slot_bytes=self._layout(group_tokens).slot_bytes,
            gap_bytes=gap_bytes,
        )

    def _layout(self, group_tokens: int) -> GroupLayout:
        facts = self.facts
        geometry = KVGeometry(
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            group_tokens=group_tokens,
            itemsize_bytes=facts.store_itemsize_bytes,
        )
        return GroupLayout(geometry, max(self.profile.disk.alignment_bytes, facts.store_itemsize_bytes))


def search(
    pricing: Pricing, request: Request, *, prefer: Prefer, on_step: Callable[[int, int], None]
) -> tuple[Candidate, list[Candidate]]:
    """Return the best candidate and all candidates that fit the limit, the best few also with a longer read gap.

    ``on_step`` is called with (configurations priced, configurations in all). Raises MemoryBudgetError when the limit
    is below the minimum of every configuration.
    """
    configs = list(_configs(pricing, request))
    found = []
    for number, config in enumerate(configs):
        if (candidate := pricing.cheapest(config, request)) is not None:
            found.append(candidate)
        on_step(number + 1, len(configs))
    if not found:
        raise _too_small(pricing, request, configs)
    found += _with_longer_gaps(pricing, request, found, prefer)
    best = choose(found, prefer)
    logger.debug(
        "priced %d configurations for %d tokens, %d fit %s; chosen: %s, G = %d, step %.1f ms, KL %.4f",
        len(configs),
        request.context_tokens,
        len(found),
        format_bytes(request.limit_bytes),
        best.sketch,
        best.config.group_tokens,
        1e3 * best.cost.step_s,
        best.expected_kl,
    )
    return best, found


def _with_longer_gaps(
    pricing: Pricing, request: Request, found: list[Candidate], prefer: Prefer
) -> Iterator[Candidate]:
    """Yield the best few candidates with the longer gap that makes them fastest, where it saves enough time."""
    rest = list(found)
    for _ in range(min(FINALISTS, len(found))):
        best = choose(rest, prefer)
        rest.remove(best)
        same = replace(request, limit_bytes=int(best.config.kv_memory))
        longer = [pricing.price(best.config.replace(read_gap_bytes=gap_bytes), same) for gap_bytes in GAPS_BYTES]
        fastest = min((each for each in longer if each is not None), key=lambda each: each.cost.step_s, default=best)
        if fastest.cost.step_s <= (1 - LEAST_GAIN) * best.cost.step_s:
            yield fastest


def choose(found: list[Candidate], prefer: Prefer) -> Candidate:
    """Choose the best candidate by the preferred measure within the slack of the other. Compares expected KL."""
    if prefer == "quality":
        fastest_s = min(each.cost.step_s for each in found)
        within = [each for each in found if each.cost.step_s <= TIME_SLACK * fastest_s]
        return min(within, key=lambda each: (each.expected_kl, each.cost.step_s))
    best = min(each.expected_kl for each in found)
    within = [each for each in found if each.expected_kl <= KL_SLACK * best]
    return min(within, key=lambda each: (each.cost.step_s, each.expected_kl))


def _configs(pricing: Pricing, request: Request) -> Iterator[Config]:
    for sketch in sketch_sizes(pricing.facts.key_elements):
        if not pricing.tables.measured(sketch):
            continue
        for group_tokens in GROUPS:
            config = Config(
                kv_memory=request.limit_bytes,
                group_tokens=group_tokens,
                sketch_rank=sketch.rank,
                sketch_bits=sketch.bits,
            )
            config = config.replace(select_tokens=pricing.select_tokens(config, request))
            yield config
            if by_layer := pricing.layer_select_tokens(config, request.context_tokens):
                yield config.replace(layer_select_tokens=by_layer)


def _too_small(pricing: Pricing, request: Request, configs: list[Config]) -> MemoryBudgetError:
    """Build the error for a limit below every minimum, with the smallest minimum."""
    needs = min(
        (pricing.needs(config, request.batch) for config in configs),
        key=lambda each: each.minimum_bytes(request.context_tokens),
    )
    parts = needs.minimum_parts(request.context_tokens)
    smallest, longest = sum(parts.values()), needs.longest_tokens(request.limit_bytes)
    return MemoryBudgetError(
        f"kv_memory: {format_bytes(request.limit_bytes)} is too small for {request.batch} x "
        f"{request.context_tokens:,} tokens whatever the parameters; it allows {longest:,} tokens",
        minimum_bytes=smallest,
        longest_tokens=longest,
        parts=parts,
        hint=f"set kv_memory to at least {ceil_div(smallest, KIB)}KiB ({format_parts(parts)})",
    )


def _two_digits(count: int) -> int:
    """Round down to two significant digits, so that similar numbers of slots share one simulation."""
    if count < 100:
        return count
    unit = 10 ** (int(math.log10(count)) - 1)
    return int(count // unit * unit)


def _times(traffic: Traffic, batch: int) -> Traffic:
    """Traffic of ``batch`` sequences."""
    return Traffic(
        selected_groups=traffic.selected_groups * batch,
        missed_groups=traffic.missed_groups * batch,
        reads=traffic.reads * batch,
        read_bytes=traffic.read_bytes * batch,
    )
