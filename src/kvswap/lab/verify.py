"""A promise beside the run: the steps of a configuration on evaluation text, part by part.

The same tokens go through full attention in turns, for the KL, as long as its cache fits in memory.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.corpus import evaluation_topics
from kvswap.core.trace import CacheStats
from kvswap.errors import InputError
from kvswap.lab.evals.forced import ForcedRun, force, run_forced, share_prompt
from kvswap.lab.rivals.registry import with_methods
from kvswap.memory.available import available_bytes
from kvswap.models.loading import LoadedModel
from kvswap.tuning.disk_curve import Progress
from kvswap.tuning.tuned import Promise, Solution

STEPS = 50
BLOCKS = 5
PARTS = ("predict_s", "slots_s", "submit_s", "wait_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One configuration's steps: ``step_s`` is the median of five blocks' medians, parts are medians, counts means.

    ``kl`` is None without full attention to compare with.
    """

    step_s: float
    parts_s: dict[str, float]
    reads: float
    read_bytes: float
    reuse_rate: float
    kl: float | None
    kv_memory_peak_bytes: int
    reuse_slots: int


def measure_steps(
    loaded: LoadedModel,
    configs: Sequence[Config],
    *,
    tokens: int,
    steps: int = STEPS,
    start: int = 0,
    with_full: bool = True,
    on_progress: Progress | None = None,
) -> list[Measured]:
    """Decode the last ``steps`` of ``tokens`` tokens of evaluation text under each configuration, in turns.

    The text begins at its token ``start``. ``with_full``: full attention computes the prompt for all and takes its
    turns too, for the KL. Raises InputError when the text is too short.
    """
    ids = evaluation_ids(loaded, tokens, start)
    wanted = [("full", Config())] * with_full + [("kvswap", config) for config in configs]
    report = on_progress or (lambda stage, done, total: None)
    with attach_each(loaded.model, with_methods(wanted), tokenizer=loaded.tokenizer, on_progress=None) as caches:
        names = {("full" if with_full and not i else str(i - with_full)): cache for i, cache in enumerate(caches)}
        seen: dict[str, list[CacheStats]] = {name: [] for name in names}

        def step(done: int, total: int) -> None:
            for name, cache in names.items():
                seen[name].append(cache.stats)
            report("verify", done, total)

        if with_full:
            row = share_prompt(loaded.model, caches, ids[:-steps])
            runs = {name: ForcedRun() for name in names}
            step(1, steps + 1)
            force(loaded.model, names, ids[-steps:], dict.fromkeys(names, row), runs, on_step=step)
        else:
            runs = run_forced(loaded.model, names, ids, steps, on_step=step)
        return [_measured(runs[str(i)], seen[str(i)], with_full=with_full) for i in range(len(configs))]


def verify(
    loaded: LoadedModel, solution: Solution, *, on_progress: Progress | None = None
) -> list[tuple[str, float, float]]:
    """Rows of name, promised and measured. Raises InputError when there is not enough text."""
    promise = solution.promise
    tokens = solution.context_tokens
    full_bytes = 2 * sum(promise.memory_parts.values()) * 16  # an eighth, and float32: a rough upper end
    (found,) = measure_steps(
        loaded,
        [solution.config],
        tokens=tokens,
        with_full=full_bytes < available_bytes() // 2,
        on_progress=on_progress,
    )
    return rows(promise, found)


def rows(promise: Promise, found: Measured) -> list[tuple[str, float, float]]:
    """Promised beside measured, times in milliseconds; KL is measured on one text and is to stay below the promise."""
    measured_parts = found.parts_s
    table = [
        ("tokens/s", promise.tokens_per_s, 1 / found.step_s),
        ("step, ms", 1e3 * promise.step_s, 1e3 * found.step_s),
        *(
            (name.replace("_s", ", ms"), 1e3 * getattr(promise, name), 1e3 * value)
            for name, value in measured_parts.items()
        ),
        ("reads a step", promise.reads, found.reads),
        ("MB read a step", promise.read_bytes / 1e6, found.read_bytes / 1e6),
        ("reuse rate", promise.reuse_rate, found.reuse_rate),
        ("memory, MiB", sum(promise.memory_parts.values()) / 2**20, found.kv_memory_peak_bytes / 2**20),
    ]
    if found.kl is None:
        return table
    return [
        *table,
        ("KL, 9 of 10 texts below", promise.promised_kl, found.kl),
        ("KL, mean over texts", promise.expected_kl, found.kl),
    ]


def evaluation_ids(loaded: LoadedModel, tokens: int, start: int = 0) -> list[int]:
    """``tokens`` tokens of the evaluation text from ``start`` on. Raises InputError when there are not so many."""
    text = "\n\n".join(text for _, text in evaluation_topics())
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < start + tokens:
        raise InputError(
            f"the evaluation text has {len(ids):,} tokens, {start + tokens:,} are needed", hint="tune for less"
        )
    return ids[start : start + tokens]


def _measured(run: ForcedRun, seen: list[CacheStats], *, with_full: bool) -> Measured:
    """``seen``: the counters after the prompt and after each step."""
    size = max(1, len(run.step_s) // BLOCKS)
    medians = [statistics.median(run.step_s[start : start + size]) for start in range(0, size * BLOCKS, size)]
    first, last, steps = seen[0], seen[-1], len(run.step_s)

    def changes(name: str) -> list[float]:
        return [float(getattr(after, name) - getattr(before, name)) for before, after in itertools.pairwise(seen)]

    parts_s = {name: changes("io_wait_s" if name == "wait_s" else name) for name in PARTS}
    compute_s = [step_s - sum(parts) for step_s, *parts in zip(run.step_s, *parts_s.values(), strict=True)]
    selected = last.selected_groups - first.selected_groups
    reused = last.reuse_rate * last.selected_groups - first.reuse_rate * first.selected_groups
    return Measured(
        step_s=statistics.median(medians),
        parts_s={"compute_s": statistics.median(compute_s), **{k: statistics.median(v) for k, v in parts_s.items()}},
        reads=sum(changes("disk_reads")) / steps,
        read_bytes=sum(changes("disk_read_bytes")) / steps,
        reuse_rate=reused / selected if selected else 0.0,
        kl=statistics.fmean(run.kl) if with_full else None,
        kv_memory_peak_bytes=last.kv_memory_peak_bytes,
        reuse_slots=last.reuse_slots,
    )
