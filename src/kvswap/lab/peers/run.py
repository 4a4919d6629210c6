"""Measure kvswap and other programs on one model file: the same tokens, the same threads, turns in one run.

Every context gets new processes, one for each program. The order of prefills changes from context to context, and that
of decode turns from round to round. A process that waits for its turn sleeps. The results file is replaced after every
context, and an interrupted run goes on with the next one. ``kvswap bench --peers`` calls ``compare``. One thread.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvswap.config import AUTO_LEAST_TOKENS, Config
from kvswap.disk.json_files import read_results, write_json
from kvswap.errors import ConfigError, InputError, KVSwapError
from kvswap.lab.peers.worker import PROGRAMS
from kvswap.tuning.machine import describe_machine

FORMAT = 1
OWN = "kvswap"
WARM_STEPS = 4
"""Steps of each program that are not counted."""
PAUSE_S = 0.05
"""Pause before each turn: the threads of the program before go to sleep."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``repeat`` turns of ``new_tokens`` steps for every program and context, with ``threads`` threads each."""

    peers: Sequence[str]
    contexts: Sequence[int]
    new_tokens: int
    repeat: int
    threads: int
    label: str = ""

    @property
    def steps(self) -> int:
        """Decode steps of each program at each context."""
        return WARM_STEPS + self.new_tokens * self.repeat


class Worker:
    """The process of one program. Raises KVSwapError for what the program reports."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "kvswap.lab.peers.worker", name]
        # A pipe that nobody reads would fill up.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8"
        )

    def ask(self, do: str, **values: Any) -> Row:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says it
            print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise KVSwapError(f"{self.name} ended during {do}: {self._last_words()}", hint="try a shorter context")
        found: Row = json.loads(line)
        if "error" in found:
            raise KVSwapError(f"{self.name}: {found['error']}", hint=found["hint"])
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        """The last line that the process wrote to standard error, or its exit status."""
        self._process.communicate()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"


def compare(
    model: str,
    gguf: Path,
    config: Config,
    plan: Plan,
    *,
    documents: Sequence[str],
    file: Path,
    on_progress: Callable[[str, int, int], None],
) -> list[Row]:
    """Measure what is missing in ``file``; returns one row for each context and program of the plan.

    ``model`` is the name that kvswap loads, ``gguf`` the file behind it, which the other programs load.

    Raises
    ------
    ConfigError
        When ``file`` has results of another comparison, or a peer is not known or not installed.
    InputError
        When the text is too short.
    """
    if unknown := [peer for peer in plan.peers if peer not in PROGRAMS or peer == OWN]:
        known = ", ".join(name for name in PROGRAMS if name != OWN)
        raise ConfigError(f"--peers: {unknown[0]} is not known", hint=f"known peers: {known}")
    content = _content(gguf, config, plan, file)
    done = {row["context"] for row in content["results"]}
    for number, context in enumerate(plan.contexts):
        on_progress("bench", number, len(plan.contexts))
        if context not in done:
            options = {"model": model, "file": str(gguf), "threads": plan.threads, "config": _plain(config)}
            content["results"] += _measure(plan, context, options, list(documents), flip=number % 2 == 1)
            write_json(file, content)
    on_progress("bench", len(plan.contexts), len(plan.contexts))
    return [row for row in content["results"] if row["context"] in plan.contexts]


def _plain(config: Config) -> Row:
    return {key: value for key, value in config.to_dict().items() if value is not None}


def _settings(config: Config) -> Row:
    return {key: value for key, value in config.to_dict().items() if key != "kv_dir"}


def _content(gguf: Path, config: Config, plan: Plan, file: Path) -> Row:
    kept = {key: value for key, value in asdict(plan).items() if key != "contexts"}
    identity = {"model": gguf.name, "model_bytes": gguf.stat().st_size, "config": _settings(config), **kept}
    identity["peers"] = list(plan.peers)
    machine = asdict(describe_machine())
    empty = {"format": FORMAT, "identity": identity, "environment": {"machine": machine}, "results": []}
    older = {"config": _settings(Config(select_tokens=AUTO_LEAST_TOKENS))}
    return read_results(file, empty, kind="a comparison with peers", older=older)


@contextlib.contextmanager
def _workers(names: Sequence[str]) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _measure(plan: Plan, context: int, options: Row, documents: list[str], *, flip: bool) -> list[Row]:
    """Rows of all programs at one context."""
    with _workers([OWN, *plan.peers]) as workers:
        rows = {}
        for worker in workers:
            start_s = time.perf_counter()
            found = worker.ask("load", context_tokens=context + plan.steps, **options)
            rows[worker.name] = {"context": context, "program": worker.name, **found}
            rows[worker.name]["load_s"] = time.perf_counter() - start_s
        tokens = workers[0].ask("encode", documents=documents)["tokens"]
        needed = context + plan.steps
        if len(tokens) < needed:
            raise InputError(
                f"context {context:,}: {needed:,} tokens of text are needed, there are {len(tokens):,}",
                hint="add text with --document, or use a shorter context",
            )
        for worker in reversed(workers) if flip else workers:
            time.sleep(PAUSE_S)
            took_s = worker.ask("prefill", tokens=tokens[:context])["prefill_s"]
            rows[worker.name] |= {"prefill_s": took_s, "prefill_tokens_per_s": context / took_s}
        turns = _turns(workers, tokens[context:needed], plan)
        for worker in workers:
            rows[worker.name] |= worker.ask("memory") | _summary(turns[worker.name])
        for row in rows.values():
            row["same_next_token"] = _share_equal(turns[OWN], turns[row["program"]])
            row["decode_ratio"] = _ratio(turns[OWN], turns[row["program"]])
        return list(rows.values())


def _turns(workers: Sequence[Worker], tokens: list[int], plan: Plan) -> dict[str, list[Row]]:
    """Turns of every program; the order turns round from round to round."""
    turns: dict[str, list[Row]] = {worker.name: [] for worker in workers}
    for worker in workers:
        worker.ask("steps", tokens=tokens[:WARM_STEPS])
    for number in range(plan.repeat):
        first = WARM_STEPS + number * plan.new_tokens
        for worker in workers if number % 2 == 0 else reversed(workers):
            time.sleep(PAUSE_S)
            turns[worker.name].append(worker.ask("steps", tokens=tokens[first : first + plan.new_tokens]))
    return turns


def _summary(turns: Sequence[Row]) -> Row:
    rates = [len(turn["step_s"]) / sum(turn["step_s"]) for turn in turns]
    return {
        "decode_tokens_per_s": statistics.median(rates),
        "decode_spread": [min(rates), max(rates)],
        "step_s": [[round(each, 6) for each in turn["step_s"]] for turn in turns],
    }


def _ratio(own: Sequence[Row], other: Sequence[Row]) -> float:
    """Speed of kvswap's steps in terms of the other's: the median over rounds of the ratio of median steps."""
    pairs = zip(own, other, strict=True)
    return float(statistics.median(statistics.median(b["step_s"]) / statistics.median(a["step_s"]) for a, b in pairs))


def _share_equal(own: Sequence[Row], other: Sequence[Row]) -> float:
    """Share of steps after which both programs have the same most likely token."""
    pairs = [pair for a, b in zip(own, other, strict=True) for pair in zip(a["top"], b["top"], strict=True)]
    return float(sum(a == b for a, b in pairs) / len(pairs))
