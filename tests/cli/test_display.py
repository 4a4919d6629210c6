"""What a run shows on stderr."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.cli.display import Display, printable, show_answer


def test_a_notice_is_shown_once() -> None:
    stream = io.StringIO()
    display = Display(stream)
    for text in ("no io_uring", "slow disk", "no io_uring"):
        display.notice(text)
    assert stream.getvalue().splitlines() == ["note: no io_uring", "note: slow disk"]


def test_progress_without_a_terminal_is_a_few_lines() -> None:
    stream = io.StringIO()
    display = Display(stream)
    for done in range(1, 101):
        display.progress("prefill", done, 100)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 5
    assert all(line.startswith("reading the prompt: ") for line in lines) and "100%" in lines[-1]


def test_lines_say_how_long_it_still_takes_and_none_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 200))
    monkeypatch.setattr("kvswap.cli.display.time.perf_counter", lambda: float(next(clock)))
    stream = io.StringIO()
    display = Display(stream)
    for done in range(1, 11):  # 200 s each: 10 % of the work
        display.progress("evaluate", done, 100)
    display.progress("evaluate", 100, 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "evaluating: 2%, 6 min 40 s, about 326 min 40 s left"
    assert len(lines) == 6 and lines[-1].startswith("evaluating: 100%, ") and "left" not in lines[-1]


@given(st.text(st.characters()))
def test_text_from_elsewhere_cannot_steer_the_terminal(text: str) -> None:
    """Neither control characters, nor marks that turn the direction of text, nor what cannot be encoded."""
    for shown, kept in ((printable(text), ""), (printable(text, lines=True), "\t\n")):
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in kept]
        assert not [c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF")]
        shown.encode()
    if text.isprintable():
        assert printable(text) == text


def test_answers_are_exact_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((io.StringIO(), "a\x1b[2J\n"), (Terminal(), "a\\x1b[2J\n")):
        monkeypatch.setattr("sys.stdout", stream)
        show_answer("a\x1b[2J\n")
        assert stream.getvalue() == expected


def test_notices_and_summaries_are_printable() -> None:
    stream = io.StringIO()
    Display(stream).notice("model \x1b]0;owned\x07\nerror: x")
    assert stream.getvalue() == "note: model \\x1b]0;owned\\x07\\nerror: x\n"
