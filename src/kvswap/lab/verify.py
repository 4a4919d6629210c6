"""Check predictions against real runs: time the decode steps of configurations on evaluation text, part by part.

``kvswap tune --verify`` and ``benchmarks/{cost_model,tuner}.py`` call this. Full attention takes the same tokens,
interleaved with the configurations, to measure the KL; it is left out where its cache might not fit in memory. One
thread, which must be the one that runs the model.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.core.cache_stats import CacheStats
from kvswap.core.corpus import evaluation_topics
from kvswap.errors import InputError
from kvswap.lab.evals.teacher_forcing import ForcedRun, force, run_forced, share_prompt
from kvswap.lab.rivals.registry import with_methods
from kvswap.memory.available import available_bytes
from kvswap.models.loading import LoadedModel
from kvswap.tuning.measure_disk import Progress
from kvswap.tuning.solution import Prediction, Solution

STEPS = 50
BLOCKS = 5
PARTS = ("predict_s", "slots_s", "submit_s", "wait_s")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measured steps of one configuration.

    ``step_s`` is the median of the medians of five blocks of steps. ``parts_s`` are medians over steps; ``reads`` and
    ``read_bytes`` are means. ``kl`` is None where full attention did not run.
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
    """Decode the last ``steps`` of ``tokens`` tokens of evaluation text under each configuration, interleaved.

    The text begins at token ``start``. ``with_full``: full attention computes the prompt once for all configurations
    and takes the same steps, for the KL. Raises InputError when the text is too short.
    """
    ids = evaluation_ids(loaded, tokens, start)
    methods = [("full", Config())] * with_full + [("kvswap", config) for config in configs]
    report = on_progress or (lambda stage, done, total: None)
    logger.debug("running %d configurations for %d steps after %d tokens", len(configs), steps, tokens - steps)
    with attach_each(loaded.model, with_methods(methods), tokenizer=loaded.tokenizer, on_progress=None) as caches:
        names = {("full" if with_full and not i else str(i - with_full)): cache for i, cache in enumerate(caches)}
        stats: dict[str, list[CacheStats]] = {name: [] for name in names}

        def step(done: int, total: int) -> None:
            for name, cache in names.items():
                stats[name].append(cache.stats)
            report("verify", done, total)

        if with_full:
            row = share_prompt(loaded.model, caches, ids[:-steps])
            runs = {name: ForcedRun() for name in names}
            step(1, steps + 1)
            force(loaded.model, names, ids[-steps:], dict.fromkeys(names, row), runs, on_step=step)
        else:
            runs = run_forced(loaded.model, names, ids, steps, on_step=step)
        return [_measured(runs[str(i)], stats[str(i)], with_full=with_full) for i in range(len(configs))]


def verify(
    loaded: LoadedModel, solution: Solution, *, on_progress: Progress | None = None
) -> list[tuple[str, float, float]]:
    """Run a solution and return rows of name, predicted value and measured value.

    Raises InputError when the evaluation text is too short for the solution's context.
    """
    # A rough upper bound of full attention's cache: its limit may be an eighth of the 16-bit cache, and it may compute
    # in float32.
    full_bytes = 2 * sum(solution.prediction.memory_parts.values()) * 16
    (found,) = measure_steps(
        loaded,
        [solution.config],
        tokens=solution.context_tokens,
        with_full=full_bytes < available_bytes() // 2,
        on_progress=on_progress,
    )
    return rows(solution.prediction, found)


def rows(predicted: Prediction, measured: Measured) -> list[tuple[str, float, float]]:
    """Return rows of name, predicted value and measured value; times in milliseconds.

    The measured KL is that of one text. It is compared with the bound and with the expected mean over texts.
    """
    table = [
        ("tokens/s", predicted.tokens_per_s, 1 / measured.step_s),
        ("step, ms", 1e3 * predicted.step_s, 1e3 * measured.step_s),
        *(
            (name.replace("_s", ", ms"), 1e3 * getattr(predicted, name), 1e3 * value)
            for name, value in measured.parts_s.items()
        ),
        ("reads per step", predicted.reads, measured.reads),
        ("MB read per step", predicted.read_bytes / 1e6, measured.read_bytes / 1e6),
        ("reuse rate", predicted.reuse_rate, measured.reuse_rate),
        ("memory, MiB", sum(predicted.memory_parts.values()) / 2**20, measured.kv_memory_peak_bytes / 2**20),
    ]
    if measured.kl is None:
        return table
    return [
        *table,
        ("KL, 9 of 10 texts below", predicted.kl_bound, measured.kl),
        ("KL, mean over texts", predicted.expected_kl, measured.kl),
    ]


def evaluation_ids(loaded: LoadedModel, tokens: int, start: int = 0) -> list[int]:
    """Return ``tokens`` token ids of the evaluation text from token ``start`` on.

    Raises InputError when the text is too short.
    """
    text = "\n\n".join(text for _, text in evaluation_topics())
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < start + tokens:
        raise InputError(
            f"the evaluation text has {len(ids):,} tokens, {start + tokens:,} are needed",
            hint="use a shorter context, or leave out --verify",
        )
    return ids[start : start + tokens]


def _measured(run: ForcedRun, stats: list[CacheStats], *, with_full: bool) -> Measured:
    """Summarise a run. ``stats`` are the cache's statistics after the prompt and after each step."""
    size = max(1, len(run.step_s) // BLOCKS)
    medians = [statistics.median(run.step_s[start : start + size]) for start in range(0, size * BLOCKS, size)]
    first, last, steps = stats[0], stats[-1], len(run.step_s)

    def by_step(name: str) -> list[float]:
        return [float(getattr(after, name) - getattr(before, name)) for before, after in itertools.pairwise(stats)]

    parts_s = {name: by_step("io_wait_s" if name == "wait_s" else name) for name in PARTS}
    compute_s = [step_s - sum(parts) for step_s, *parts in zip(run.step_s, *parts_s.values(), strict=True)]
    selected = last.selected_groups - first.selected_groups
    reused = last.reuse_rate * last.selected_groups - first.reuse_rate * first.selected_groups
    return Measured(
        step_s=statistics.median(medians),
        parts_s={"compute_s": statistics.median(compute_s), **{k: statistics.median(v) for k, v in parts_s.items()}},
        reads=sum(by_step("disk_reads")) / steps,
        read_bytes=sum(by_step("disk_read_bytes")) / steps,
        reuse_rate=reused / selected if selected else 0.0,
        kl=statistics.fmean(run.kl) if with_full else None,
        kv_memory_peak_bytes=last.kv_memory_peak_bytes,
        reuse_slots=last.reuse_slots,
    )
