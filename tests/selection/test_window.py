"""Every group of a sequence is either pinned, at a place of its own, or a candidate for selection."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvswap.selection.window import Window

WINDOWS = st.builds(
    Window,
    group_tokens=st.integers(1, 16),
    sink_groups=st.integers(0, 5),
    recent_groups=st.integers(1, 20),
    select_groups=st.integers(1, 100),
)


def pinned(window: Window, current: int) -> list[int]:
    sinks = range(min(window.sink_groups, current + 1))
    return [*sinks, *range(window.ring_start(current), current + 1)]


@given(WINDOWS, st.integers(1, 3000))
def test_pinned_and_candidates_are_all_groups_once(window: Window, tokens: int) -> None:
    current = (tokens - 1) // window.group_tokens
    candidates = range(window.sink_groups, window.candidates(tokens))
    together = [*pinned(window, current), *candidates]
    assert sorted(together) == list(range(current + 1))


@given(WINDOWS, st.integers(0, 500))
def test_pinned_groups_have_places_of_their_own(window: Window, current: int) -> None:
    homes = window.pinned_slot(np.array(pinned(window, current), np.int64)).tolist()
    assert len(set(homes)) == len(homes)
    assert all(0 <= home < window.pinned_groups for home in homes)


@given(WINDOWS, st.integers(0, 500))
def test_the_newest_group_takes_the_place_of_the_oldest_recent_one(window: Window, current: int) -> None:
    before, after = set(pinned(window, current)), set(pinned(window, current + 1))
    gone = before - after
    assert len(gone) == (1 if current + 1 > window.sink_groups + window.recent_groups else 0)
    for group in gone:
        old, new = window.pinned_slot(np.array([group, current + 1], np.int64)).tolist()
        assert old == new


@given(WINDOWS, st.integers(1, 3000))
def test_the_recent_window_is_whole_beside_the_tail(window: Window, tokens: int) -> None:
    current = (tokens - 1) // window.group_tokens
    wanted = {group for group in range(current + 1) if group >= current - window.recent_groups}
    assert wanted <= set(pinned(window, current))


@given(WINDOWS, st.integers(1, 3000))
def test_selecting_all_is_when_the_selection_holds_every_candidate(window: Window, tokens: int) -> None:
    candidates = len(range(window.sink_groups, window.candidates(tokens)))
    assert window.selects_all(tokens) is (candidates <= window.select_groups)
    attended = len(pinned(window, (tokens - 1) // window.group_tokens)) + min(candidates, window.select_groups)
    assert attended <= window.pinned_groups + window.select_groups


@given(WINDOWS)
def test_groups_wait_for_a_flush_within_the_ring_only(window: Window) -> None:
    assert 1 <= window.flush_groups <= window.recent_groups


def test_selecting_all_ends_with_one_candidate_too_many() -> None:
    window = Window(group_tokens=4, sink_groups=1, recent_groups=2, select_groups=5)
    full = 4 * (1 + 5 + 3)  # sinks, selection, recent window and tail
    assert window.selects_all(full)
    assert not window.selects_all(full + 1)
