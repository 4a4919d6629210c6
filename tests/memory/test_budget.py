"""The division of one memory limit: everything counted, and the limit and the longest context each other's inverse."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.errors import MemoryBudgetError
from kvswap.memory.budget import OWNER_BYTES, SHORT_TOKENS, STEP_GROUPS, MemoryNeeds, PrefillNeeds, capacity_for, grown
from kvswap.selection.window import Window
from kvswap.store.layout import TILE_BUFFERS

WINDOWS = st.builds(
    Window,
    group_tokens=st.sampled_from([1, 4, 8]),
    sink_groups=st.integers(0, 4),
    recent_groups=st.integers(1, 20),
    select_groups=st.integers(1, 100),
)


@st.composite
def needs(draw: st.DrawFn) -> MemoryNeeds:
    window = draw(WINDOWS)
    store_itemsize = draw(st.sampled_from([2, 4]))
    token_bytes = 2 * draw(st.sampled_from([64, 192, 1024])) * store_itemsize
    return MemoryNeeds(
        layers=draw(st.integers(1, 40)),
        batch=draw(st.integers(1, 4)),
        scoring_token_bytes=draw(st.integers(12, 600)),
        window=window,
        slot_bytes=-(-window.group_tokens * token_bytes // 512) * 512,
        token_bytes=token_bytes,
        compute_itemsize_bytes=draw(st.sampled_from([2, 4])),
        store_itemsize_bytes=store_itemsize,
        sketch_token_bytes=draw(st.integers(8, 300)),
        basis_bytes=draw(st.integers(0, 1 << 20)),
    )


@given(needs(), st.integers(0, 200_000), st.integers(0, 5_000))
def test_a_longer_context_never_needs_less(need: MemoryNeeds, tokens: int, more: int) -> None:
    assert need.minimum_bytes(tokens) <= need.minimum_bytes(tokens + more)
    shorter, longer = need.parts(capacity_for(tokens)), need.parts(capacity_for(tokens + more))
    assert all(shorter[part] <= longer[part] for part in shorter)


@given(needs(), st.integers(0, 100_000))
def test_longest_context_and_smallest_limit_are_inverse(need: MemoryNeeds, tokens: int) -> None:
    limit = need.minimum_bytes(tokens)
    longest = need.longest_tokens(limit)
    assert longest >= tokens
    assert need.minimum_bytes(longest) <= limit < need.minimum_bytes(longest + 1)


@given(needs(), st.integers(1, 64), st.integers(0, 3_000), st.integers(1, 200_000), st.integers(0, 1 << 28))
def test_a_selection_grows_within_its_ends_and_half_of_the_spare_memory(
    need: MemoryNeeds, share: int, most: int, tokens: int, limit: int
) -> None:
    least = need.window.select_groups
    window = dataclasses.replace(need.window, share=share, most_select_groups=least + most)
    growing = dataclasses.replace(need, window=window)
    found = growing.select_groups(tokens, limit)
    assert least <= found <= window.wanted_groups(grown(tokens)) <= least + most and (found - least) % STEP_GROUPS == 0
    smallest = sum(growing.parts(capacity_for(tokens)).values())
    taken = sum(growing.parts(capacity_for(tokens), found).values()) - smallest
    assert taken <= max(0, limit - smallest) // 2 + need.batch * need.slot_bytes  # halves are rounded to whole groups
    assert found == growing.select_groups(grown(tokens), limit) <= growing.select_groups(tokens, 2 * limit)
    assert need.select_groups(tokens, limit) == least


@given(needs())
def test_under_the_least_limit_no_context_works(need: MemoryNeeds) -> None:
    assert need.longest_tokens(need.minimum_bytes(0) - 1) == 0


@given(needs(), st.integers(1, 100_000))
def test_auto_is_an_eighth_of_16_bit_or_holds_a_short_context_and_always_works(need: MemoryNeeds, tokens: int) -> None:
    limit = need.auto_limit_bytes(tokens)
    elements = need.layers * need.batch * tokens * need.token_bytes // need.store_itemsize_bytes
    assert limit >= need.minimum_bytes(tokens)
    assert limit == max(elements * 2 // 8, need.minimum_bytes(tokens), need.auto_limit_bytes(1))
    if tokens > SHORT_TOKENS:
        return
    capacity = capacity_for(tokens)
    slots = need.reuse_slots(capacity, limit - sum(need.parts(capacity).values()))
    assert slots == need.layers * need.batch * -(-capacity // need.window.group_tokens)


@given(needs(), st.integers(1, 100_000), st.integers(1, 100_000))
def test_auto_gives_a_longer_context_no_less(need: MemoryNeeds, tokens: int, more: int) -> None:
    assert need.auto_limit_bytes(tokens + more) >= need.auto_limit_bytes(tokens)


@given(needs(), st.integers(1, 100_000), st.integers(0, 20_000), st.booleans())
def test_an_answer_is_refused_where_it_cannot_fit(need: MemoryNeeds, tokens: int, answer: int, fits: bool) -> None:
    """The limit that an error names is the smallest that works: one byte less is refused."""
    need.check_answer(0, tokens, 0)  # no answer, no question
    limit = max(need.minimum_bytes(tokens), sum(need.parts(-(-(tokens + answer) // 256) * 256).values()))
    if fits:
        need.check_answer(limit, tokens, answer)
        return
    if limit == need.minimum_bytes(tokens):
        return
    with pytest.raises(MemoryBudgetError, match="an answer of up to") as caught:
        need.check_answer(limit - 1, tokens, answer)
    assert caught.value.minimum_bytes == limit and caught.value.longest_tokens < tokens + answer


@given(needs(), st.integers(1, 50_000), st.integers(0, 1 << 30))
def test_slots_are_paid_for_and_no_more_than_groups(need: MemoryNeeds, tokens: int, free: int) -> None:
    slots = need.reuse_slots(tokens, free)
    groups = need.layers * need.batch * -(-tokens // need.window.group_tokens)
    one = need.slot_bytes + OWNER_BYTES
    assert slots * one <= free
    assert slots == groups or (slots < groups and free < (slots + 1) * one)


@given(needs(), st.integers(0, 50_000))
def test_parts_that_hold_real_arrays_are_large_enough(need: MemoryNeeds, tokens: int) -> None:
    parts = need.parts(tokens)
    pairs = need.layers * need.batch
    assert parts["sketch"] >= pairs * tokens * need.sketch_token_bytes
    assert parts["tails"] >= pairs * need.window.pinned_groups * need.slot_bytes
    assert parts["staging"] >= 2 * need.batch * need.window.select_groups * need.slot_bytes
    assert parts["scratch"] >= need.batch * need.scoring_token_bytes * tokens
    assert parts["basis"] == need.basis_bytes
    assert all(value >= 0 for value in parts.values())


@given(needs(), st.integers(1, 10_000))
def test_twice_the_layers_have_twice_the_full_cache(need: MemoryNeeds, tokens: int) -> None:
    twice = dataclasses.replace(need, layers=2 * need.layers)
    assert twice.full_bytes(tokens) == 2 * need.full_bytes(tokens)
    assert need.full_bytes(tokens) == need.layers * need.batch * tokens * need.token_bytes


def test_no_room_no_slots() -> None:
    window = Window(group_tokens=4, sink_groups=1, recent_groups=16, select_groups=83)
    need = MemoryNeeds(
        layers=2,
        batch=1,
        scoring_token_bytes=136,
        window=window,
        slot_bytes=4096,
        token_bytes=1024,
        compute_itemsize_bytes=4,
        store_itemsize_bytes=2,
        sketch_token_bytes=48,
        basis_bytes=0,
    )
    assert need.reuse_slots(1000, -5) == 0


@given(st.integers(0, 1 << 30))
def test_capacity_leaves_room_to_grow(tokens: int) -> None:
    capacity = capacity_for(tokens)
    assert capacity % 256 == 0
    assert tokens + 256 <= capacity < tokens + 512


PROMPT = PrefillNeeds(
    batch=1,
    tokens=4096,
    chunk_tokens=512,
    hidden_elements=576,
    inner_elements=1536,
    query_heads=9,
    query_elements=576,
    key_elements=192,
    itemsize_bytes=4,
)


@pytest.mark.parametrize(
    "name",
    ["batch", "tokens", "chunk_tokens", "hidden_elements", "query_elements", "key_elements", "inner_elements"],
)
def test_prefill_needs_grow_with_each_dimension(name: str) -> None:
    larger = dataclasses.replace(PROMPT, **{name: 4 * getattr(PROMPT, name)})
    assert larger.transient_bytes() > PROMPT.transient_bytes() >= 3 * 4096 * 576 * 4


def test_windows_and_their_positions_count() -> None:
    gemma = dataclasses.replace(PROMPT, ropes=2, sliding_tokens=5 * 512)
    assert gemma.transient_bytes() - PROMPT.transient_bytes() == 2 * 64 * 4096 * 4 + 5 * 512 * 2 * 192 * 4


def test_prefill_needs_are_those_of_its_widest_moment() -> None:
    kept = (2 * 192 + 3 * 576 + 2 * 64) * 4096 * 4  # one layer's K, V, three hidden states, sines and cosines
    band, mlp = 512 * (4096 + 512) * 4, 512 * (3 * 1536 + 4 * 576) * 4
    assert PROMPT.transient_bytes() == kept + band + mlp
    whole = dataclasses.replace(PROMPT, chunk_tokens=4096)  # no mask where there is one chunk
    assert whole.transient_bytes() == kept + 8 * mlp


@pytest.mark.parametrize("change", [{"eager": True}, {"tile_bytes": 786432}])
def test_attention_that_makes_weights_needs_room_for_them(change: dict[str, int]) -> None:
    need = dataclasses.replace(PROMPT, **change)
    assert need.transient_bytes() > PROMPT.transient_bytes() + 9 * 512 * 1024 * 4
    twice = dataclasses.replace(need, query_heads=18)
    assert twice.transient_bytes() > need.transient_bytes() + 9 * 512 * 1024 * 7


def test_tiles_of_a_stored_context_are_counted_as_they_are_read_and_as_floats() -> None:
    small, large = (dataclasses.replace(PROMPT, tile_bytes=size).transient_bytes() for size in (1 << 20, 3 << 20))
    assert large - small == (TILE_BUFFERS + 2) * (2 << 20)
