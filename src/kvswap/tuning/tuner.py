"""The parameters for a memory limit: every combination is priced, the best is taken and explained.

After KVSwap (arXiv 2511.11907, section 3.5 and appendix A): inputs are a profile of disk and model, tables of quality
and reuse, the limit, the context and the batch. The paper searches step by step from the smallest group; here there are
few enough combinations to price them all. What the limit leaves after sketch, pinned groups and staging becomes reuse
slots, where they save more time than they take. Gaps that reads go through are chosen afterwards, for the best few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from kvswap.config import Config
from kvswap.errors import MemoryBudgetError
from kvswap.memory.budget import OWNER_BYTES, MemoryNeeds, capacity_for
from kvswap.selection.transform import TransformSketch, basis_bytes
from kvswap.selection.window import Window
from kvswap.store.layout import GroupLayout
from kvswap.terms import KVGeometry, ceil_div
from kvswap.tuning.budgets import layer_groups
from kvswap.tuning.cost import StepCost, Traffic, step_cost
from kvswap.tuning.profile import ModelFacts, Profile
from kvswap.tuning.tables import GROUPS, Sketching, Tables, sketchings
from kvswap.tuning.traffic import simulate
from kvswap.units import KIB, format_bytes, format_parts

Prefer = Literal["quality", "speed"]

TIME_SLACK = 1.05
"""Preferring quality: the best one among those that are at most this much slower than the fastest."""
KL_SLACK = 2.5
"""Preferring speed: the fastest among those whose KL is at most so many times the best; the defaults have about 1.7."""
GAPS_BYTES = (32 * KIB, 64 * KIB)
"""Gaps to read through that are tried beside the default, where a request may cost as much as many bytes."""
FINALISTS = 4
"""The best few, for which the gap is chosen."""
LEAST_GAIN = 0.01
"""A longer gap has to save this share of a step, since the disk does more for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One combination with its price: step, KL expected in the mean over texts and promised of a text, memory."""

    config: Config
    sketch: Sketching
    by_layer: bool
    reuse_slots: int
    traffic: Traffic
    cost: StepCost
    expected_kl: float
    promised_kl: float
    memory_parts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to tune for."""

    limit_bytes: int
    context_tokens: int
    batch: int
    select_tokens: int


class Pricing:
    """Prices of configurations of one model on one machine. Simulations are remembered."""

    def __init__(self, profile: Profile, tables: Tables, facts: ModelFacts, device: torch.device) -> None:
        assert profile.costs is not None
        self.profile, self.tables, self.facts, self._device = profile, tables, facts, device
        self._costs = profile.costs
        self._simulate = lru_cache(maxsize=None)(self._simulated)

    def needs(self, config: Config, batch: int) -> MemoryNeeds:
        """What the parts of memory take; the same arithmetic as when a cache is opened."""
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

    def layer_select_tokens(self, config: Config, context_tokens: int) -> tuple[int, ...]:
        """Tokens of each layer under the same total, by how much mass they keep."""
        context = self.tables.nearest_context(context_tokens)
        kept = self.tables.kept[context, config.group_tokens]
        groups = layer_groups(kept, min(config.select_groups, kept.shape[1] - 1))
        return tuple(config.pinned_tokens + count * config.group_tokens for count in groups)

    def cheapest(self, config: Config, request: Request) -> Candidate | None:
        """The faster of two uses of what the limit leaves: all of it for reuse, or none.

        Looking after many slots takes processor time, which a fast disk does not give back.
        """
        whole = self.price(config, request)
        if whole is None or whole.reuse_slots == 0:
            return whole
        least = self.needs(config, request.batch).minimum_bytes(request.context_tokens)
        bare = self.price(config.replace(kv_memory=least), replace(request, limit_bytes=least))
        return bare if bare is not None and bare.cost.step_s < whole.cost.step_s else whole

    def price(self, config: Config, request: Request) -> Candidate | None:
        """The price of a configuration whose rank is set, or None where it does not fit the limit."""
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
        sketch = Sketching(config.sketch_rank or 0, config.sketch_bits)
        by_layer = config.layer_select_tokens is not None
        kl = self.tables.kl(
            request.context_tokens, sketch, config.group_tokens, config.select_tokens, by_layer=by_layer
        )
        return Candidate(
            config=config,
            sketch=sketch,
            by_layer=by_layer,
            reuse_slots=slots,
            traffic=traffic,
            cost=cost,
            expected_kl=kl.expected,
            promised_kl=kl.promised,
            memory_parts=parts,
        )

    def step(self, config: Config, context_tokens: int, reuse_slots: int, batch: int = 1) -> tuple[Traffic, StepCost]:
        """Traffic and cost of a step of one sequence; a batch shares the slots and multiplies what is read."""
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
    """The best candidate and all that fit, some also with a longer gap.

    Raises MemoryBudgetError when the limit is below every one's minimum.
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
    return choose(found, prefer), found


def _with_longer_gaps(
    pricing: Pricing, request: Request, found: list[Candidate], prefer: Prefer
) -> Iterator[Candidate]:
    """The best few once more, each with the longer gap that makes it fastest, where one saves enough."""
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
    """The best by what is preferred; the other decides among equals. Compared are expected KLs, not promised ones."""
    if prefer == "quality":
        fastest_s = min(each.cost.step_s for each in found)
        within = [each for each in found if each.cost.step_s <= TIME_SLACK * fastest_s]
        return min(within, key=lambda each: (each.expected_kl, each.cost.step_s))
    best = min(each.expected_kl for each in found)
    within = [each for each in found if each.expected_kl <= KL_SLACK * best]
    return min(within, key=lambda each: (each.cost.step_s, each.expected_kl))


def _configs(pricing: Pricing, request: Request) -> Iterator[Config]:
    for sketch in sketchings(pricing.facts.key_elements):
        if not pricing.tables.measured(sketch):
            continue
        for group_tokens in GROUPS:
            config = Config(
                kv_memory=request.limit_bytes,
                group_tokens=group_tokens,
                select_tokens=request.select_tokens,
                sketch_rank=sketch.rank,
                sketch_bits=sketch.bits,
            )
            yield config
            yield config.replace(layer_select_tokens=pricing.layer_select_tokens(config, request.context_tokens))


def _too_small(pricing: Pricing, request: Request, configs: list[Config]) -> MemoryBudgetError:
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
    """Rounded down to two digits that count, so that simulations can be shared."""
    if count < 100:
        return count
    unit = 10 ** (int(math.log10(count)) - 1)
    return int(count // unit * unit)


def _times(traffic: Traffic, batch: int) -> Traffic:
    return Traffic(
        selected_groups=traffic.selected_groups * batch,
        missed_groups=traffic.missed_groups * batch,
        reads=traffic.reads * batch,
        read_bytes=traffic.read_bytes * batch,
    )
