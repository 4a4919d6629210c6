"""Stop strings: an answer ends before the first of them, however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvswap.models.stop_text import StopText

LETTERS = st.text(alphabet="abc\n", max_size=12)


@given(
    pieces=st.lists(LETTERS, max_size=8), stops=st.lists(st.text(alphabet="abc\n", min_size=1, max_size=4), max_size=3)
)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    whole, stop_text = "".join(pieces), StopText(stops)
    shown = "".join(map(stop_text.push, pieces)) + stop_text.end()
    ends = [whole.index(each) for each in stops if each in whole]
    assert bool(stop_text.found) == bool(ends)
    if not ends:
        assert shown == whole
    else:  # the first that is complete; a longer one that began earlier may not have been
        assert whole.startswith(shown + stop_text.found) and not any(each in shown for each in stops)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stop_text = StopText(["END", "\n\n"])
    assert [stop_text.push(each) for each in ("one E", "N", "D two")] == ["one ", "", ""]
    assert stop_text.found == "END" and stop_text.end() == ""
    stop_text = StopText(["END"])
    assert stop_text.push("one EN") + stop_text.end() == "one EN"
