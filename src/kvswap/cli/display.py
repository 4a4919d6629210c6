"""What a command shows on stderr: progress, notices, and the summary of a run. stdout carries only the answer."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

import click

from kvswap.units import format_bytes, format_parts, format_s

if TYPE_CHECKING:
    from kvswap.app.stats import RunStats

LABELS = {
    "calibrate": "learning this model's keys (once)",
    "prefill": "reading the prompt",
    "disk": "measuring the disk",
    "model": "timing the model",
    "tables": "measuring the quality of selections (once)",
    "tune": "searching parameters",
    "verify": "running the configuration",
    "evaluate": "evaluating",
    "bench": "measuring",
}
PLAIN_STEP, PLAIN_STEP_S = 0.25, 300.0
"""Without a terminal, progress is one line for each such share, and where none was written for so many seconds."""


class Display:
    """Shows progress bars on a terminal, and a few plain lines elsewhere. Use from one thread at a time."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._progress: Any = None
        self._task: Any = None
        self._stage = ""
        self._plain_next = 0.0
        self._plain_next_s = 0.0
        self._started_s = 0.0
        self._shown: set[str] = set()

    def notice(self, text: str) -> None:
        """Show one line about something unusual. A repeated text is shown once, because each attachment repeats it."""
        if text in self._shown:
            return
        self._shown.add(text)
        self.finish()
        self._write(f"note: {text}")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of a stage are complete."""
        if stage != self._stage:
            self.finish()
            self._begin(stage, total)
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
        else:
            self._plain(stage, done / max(1, total))
        if done >= total:
            self.finish()

    def _plain(self, stage: str, share: float) -> None:
        """Write a line where the next step of progress is reached, or the last line is old."""
        now_s = time.perf_counter()
        if share < self._plain_next and now_s < self._plain_next_s:
            return
        spent_s = now_s - self._started_s
        left = f", about {format_s(spent_s * (1 - share) / share)} left" if 0 < share < 1 else ""
        self._write(f"{LABELS.get(stage, stage)}: {share:.0%}, {format_s(spent_s)}{left}")
        while self._plain_next <= share < 1:
            self._plain_next += PLAIN_STEP
        self._plain_next_s = now_s + PLAIN_STEP_S

    def finish(self) -> None:
        """Remove the progress bar, if there is one."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._stage = None, ""

    def summary(self, stats: RunStats) -> None:
        """Show the summary of a run."""
        self.finish()
        rows = summary_rows(stats)
        width = max(len(label) for label, _ in rows)
        self._write("")
        for label, value in rows:
            self._write(f"{label.ljust(width)}  {value}")

    def sources(self, stats: RunStats) -> None:
        """Show the passages that an answer attended to most."""
        self.finish()
        self._write("")
        for line in source_lines(stats):
            self._write(line)

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._started_s, self._plain_next = stage, time.perf_counter(), PLAIN_STEP
        self._plain_next_s = self._started_s + PLAIN_STEP_S
        if not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(LABELS.get(stage, stage), total=total)
        self._progress.start()

    def _write(self, line: str) -> None:
        print(printable(line), file=self._stream, flush=True)


# ---- text from elsewhere on a terminal

_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters apart from tab and new line, marks that turn the direction of text, and halves of characters."""
_IN_A_LINE, _IN_A_TEXT = re.compile(rf"[\t\n{_CONTROLS}]"), re.compile(f"[{_CONTROLS}]")


def printable(text: str, *, lines: bool = False) -> str:
    """The text with its control characters written out (``\\x1b``), so that it cannot steer the terminal.

    Names in files come from others, and so do answers. ``lines`` keeps tabs and new lines as they are.
    """
    return (_IN_A_TEXT if lines else _IN_A_LINE).sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def show_answer(text: str) -> None:
    """Write a piece of an answer to stdout at once: to a terminal as ``printable``, elsewhere as it is."""
    shown = printable(text, lines=True) if sys.stdout.isatty() else text
    click.echo(shown, nl=False, color=True)  # color: click would take escape sequences out of what is piped
    sys.stdout.flush()


def summary_rows(stats: RunStats) -> list[tuple[str, str]]:
    """Return labels and values of the summary of a run."""
    rate = stats.decode_tokens_per_s
    speed = f"{rate:.1f} tokens/s" if rate else "no rate from a single token"
    rows = [
        ("context", f"{stats.prompt_tokens:,} tokens in, {stats.new_tokens:,} out"),
        ("full KV cache", f"{format_bytes(stats.kv_full_bytes)} ({'in memory' if _full(stats) else 'on disk'})"),
    ]
    if stats.session is not None:
        counts = f"{stats.resumed_tokens:,} tokens were stored, {stats.computed_tokens:,} were computed"
        if stats.load_expected_s is not None and stats.recompute_expected_s is not None:
            load, again = format_s(stats.load_expected_s), format_s(stats.recompute_expected_s)
            way = "computed again" if stats.computed_again else "read"
            counts += f" ({way}: {load} expected for reading, {again} for computing again)"
        all_bytes = format_bytes(stats.sessions_written_bytes)
        written = f"{format_bytes(stats.session_written_bytes)} written for it so far, {all_bytes} for all sessions"
        rows.insert(1, ("session", f"{stats.session}: {counts}; {written}"))
    if not _full(stats):
        rows += _kvswap_rows(stats)
    if stats.sliding_kv_bytes:
        rows.append(("sliding-window KV", f"{format_bytes(stats.sliding_kv_bytes)} in memory, outside the limit"))
    if stats.weights_mapped_bytes + stats.weights_anonymous_bytes:
        mapped = f"{format_bytes(stats.weights_mapped_bytes)} mapped from their file"
        rows.append(("weights", f"{mapped}, {format_bytes(stats.weights_anonymous_bytes)} in memory"))
    return [
        *rows,
        ("first token", f"after {format_s(stats.ttft_s)}{_prefill_rate(stats)}"),
        ("then", speed),
    ]


def _kvswap_rows(stats: RunStats) -> list[tuple[str, str]]:
    peak, limit = stats.kv_memory_peak_bytes, stats.kv_memory_limit_bytes
    share = f"; 1/{stats.kv_full_bytes / peak:.1f} of the full cache" if peak and peak < stats.kv_full_bytes else ""
    of_limit = f" of a limit of {format_bytes(limit)}" if limit else ""
    reads = f"{format_bytes(stats.disk_read_bytes)} in {stats.disk_reads:,} reads, I/O wait {format_s(stats.io_wait_s)}"
    page_cache = "" if stats.direct_io else ", through the page cache"
    rows = [
        ("KV memory peak", f"{format_bytes(peak)}{of_limit}{share}"),
        ("its parts", format_parts(stats.memory_parts)),
        ("prefill peak", f"{format_bytes(stats.prefill_peak_bytes)}, including the KV memory"),
        ("written to disk", format_bytes(stats.disk_write_bytes)),
        ("read from disk", f"{reads} ({stats.backend}{page_cache})"),
        ("selected", f"up to {stats.select_tokens:,} tokens a step and layer{_estimated(stats)}"),
        ("reuse", f"{stats.reuse_rate:.0%} of the selected groups were in memory already"),
    ]
    found = stats.quality
    if found is not None:
        steps = "one step" if found.checks == 1 else f"{found.checks} steps"
        kept = f"{found.mass_kept:.1%} of the attention mass kept, KL {found.kl:.4f}"
        rows.append(("quality", f"{kept}, measured in {steps} with exact attention ({format_s(found.check_s)})"))
    return rows


def _estimated(stats: RunStats) -> str:
    return "" if stats.mass_kept is None else f", an estimated {stats.mass_kept:.0%} of the attention"


def source_lines(stats: RunStats) -> list[str]:
    """Return what ``--show-sources`` shows: each passage under its place, the one with most attention first."""
    if not stats.sources:
        return ["no passage of a document was selected: the context is short enough to be attended to as a whole"]
    lines = []
    for number, each in enumerate(stats.sources, 1):
        page = f"page {each.page}, " if each.page is not None else ""
        lines += [f"[{number}] {each.document}, {page}line {each.line}: {each.share:.0%} of the attention"]
        lines += [f"    {line.strip()}" for line in each.text.splitlines() if line.strip()]
    return lines


def _full(stats: RunStats) -> bool:
    return stats.kv_memory_limit_bytes is None


def _prefill_rate(stats: RunStats) -> str:
    if stats.prefill_s <= 0:
        return ""
    return f", prefill at {(stats.prompt_tokens - stats.stored_tokens) / stats.prefill_s:.0f} tokens/s"
