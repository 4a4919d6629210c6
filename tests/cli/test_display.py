"""What a run shows on stderr."""

from __future__ import annotations

import io

from kvswap.cli.display import Display


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
