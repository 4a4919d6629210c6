"""Run an evaluation: measure every sample of every task with all variants, into a results file.

The file is replaced atomically after each sample. An interrupted run loses at most one sample; the same command
continues it. ``kvswap eval`` calls ``evaluate``. One thread.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvswap.config import Config
from kvswap.core.layer_major import Progress
from kvswap.disk.json_files import read_results, write_json
from kvswap.errors import InputError
from kvswap.lab.evals.estimate import Estimate, estimate, measure_rates
from kvswap.lab.evals.measure import Measured, measure
from kvswap.lab.evals.prompt_cache import PromptCache
from kvswap.lab.evals.results import Record, summarise
from kvswap.lab.evals.samples import DOCUMENTS, Outcome, Prompt, Sample, Source, Task
from kvswap.lab.evals.variants import FULL, SketchSetting, Variant
from kvswap.models.adapter import context_limit, inspect
from kvswap.models.loading import LoadedModel

FORMAT = 3
UNITS = 10_000
"""Units of progress of a whole run."""
MACHINE_SETTINGS = ("kv_memory", "kv_dir", "backend", "read_depth", "read_gap_bytes")
"""Settings that may differ between runs into one file: they change no result, or records have them as a key."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to evaluate: ``samples`` samples of each task and context, with every method, memory limit and setting.

    With ``texts``, it is every question about so many texts instead.
    """

    tasks: Sequence[Task]
    methods: Sequence[str]
    contexts: Sequence[int]
    kv_memory: Sequence[str]
    samples: int
    settings: Sequence[SketchSetting | None] = (None,)
    texts: int | None = None

    def count(self, task: Task) -> int:
        """Count the samples of a task, for each context."""
        return self.samples if self.texts is None else self.texts * task.questions

    @property
    def variants(self) -> list[Variant]:
        """All variants. ``full`` comes first, because the others are compared with it."""
        others = [method for method in self.methods if method != FULL.method]
        each = itertools.product(self.kv_memory, self.settings, others)
        return [FULL, *(Variant(method, limit, setting) for limit, setting, method in each)]


@dataclass(frozen=True, slots=True)
class _Work:
    """One sample, and the tasks that score it, each with the variants whose records are missing."""

    sample: Sample
    tasks: list[tuple[Task, list[Variant]]]

    @property
    def variants(self) -> list[Variant]:
        """The variants to run. ``full`` comes first, whether or not its record is missing."""
        return list(dict.fromkeys([FULL, *(variant for _, missing in self.tasks for variant in missing)]))

    def settled(self, text: str) -> bool:
        """Return whether the score of an answer that begins with ``text`` is certain in every task."""
        outcome = Outcome(nll=0.0, same=0.0, text=text)
        return all(task.settled and task.score(self.sample, outcome) == 1 for task, _ in self.tasks)


def evaluate(
    loaded: LoadedModel,
    config: Config,
    plan: Plan,
    source: Source,
    *,
    file: Path,
    prompts: PromptCache,
    limit_s: float | None = None,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> list[Record]:
    """Measure what is missing in ``file``; return the rows of everything in it.

    After ``limit_s`` seconds the run stops at the end of the current sample.

    Raises
    ------
    ConfigError
        When ``file`` contains results of another model, configuration or text.
    InputError
        When a context is longer than the model allows, or the text is too short.
    """
    longest_tokens = context_limit(loaded.model)
    for context in plan.contexts:
        _check_length(context, context, longest_tokens)
    identity = _identity(loaded, config, source)
    empty = {"format": FORMAT, "identity": identity, "samples": []}
    content = read_results(file, empty, kind="a results file of kvswap eval", older={"weights": "auto"})
    records: list[Record] = content["samples"]
    started_s = time.monotonic()
    work = _missing_work(plan, source, records, longest_tokens)
    logger.debug("%d samples to measure, %d records in %s", len(work), len(records), file)
    if not work:
        return summarise(records)
    expected = _estimate(loaded, config, work, prompts, on_progress=on_progress, on_notice=on_notice)
    on_notice(expected.sentence([each.sample for each in work]))
    text_tokens, left = source.about_tokens(), len(work)
    again = "run the same command again to continue"
    try:
        for each, found in _measured(loaded, config, work, expected, prompts, on_progress, on_notice):
            pairs = [(task, variant) for task, missing in each.tasks for variant in missing]
            records += [
                _record(task, each.sample, variant, found[variant], source, text_tokens) for task, variant in pairs
            ]
            _write(file, identity, records)
            left -= 1
            if left and limit_s is not None and time.monotonic() - started_s >= limit_s:
                on_notice(f"stopped after {limit_s / 60:g} min; {left} samples are left: {again}")
                break
    except KeyboardInterrupt:
        on_notice(f"{len(work) - left} of {len(work)} samples were measured: {again}")
        raise
    return summarise(records)


def _measured(
    loaded: LoadedModel,
    config: Config,
    work: Sequence[_Work],
    expected: Estimate,
    prompts: PromptCache,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> Iterator[tuple[_Work, dict[Variant, Measured]]]:
    """Measure one sample after another, and report the share of the expected time."""
    for number, each in enumerate(work):

        def on_fraction(share: float, number: int = number) -> None:
            on_progress("evaluate", int(expected.done(number, share) * UNITS), UNITS)

        yield (
            each,
            measure(
                loaded,
                config,
                each.variants,
                each.sample,
                prompts=prompts,
                settled=each.settled,
                shares=expected.shares(number),
                on_fraction=on_fraction,
                on_progress=on_progress,
                on_notice=on_notice,
            ),
        )


def _missing_work(plan: Plan, source: Source, records: list[Record], longest_tokens: int | None) -> list[_Work]:
    """Return all missing work. Raises InputError where a sample and what follows it exceed the model's limit."""
    work = list(_missing(plan, source, records))
    needed: dict[int, int] = {}
    for each in work:
        follows = max(len(each.sample.forced), each.sample.max_new_tokens)
        needed[each.sample.context] = max(needed.get(each.sample.context, 0), len(each.sample.prompt) + follows)
    for context, tokens in needed.items():
        _check_length(context, tokens, longest_tokens)
    return work


def _missing(plan: Plan, source: Source, records: list[Record]) -> Iterator[_Work]:
    """Yield the samples with variants that are not in the records. Tasks that share a sample share the work.

    Samples are ordered by context, then by text number, then by prompt, so that prompts with the same beginning follow
    each other.
    """
    done = {tuple(each[key] for key in ("task", "method", "kv_memory", "setting", "prompt_hash")) for each in records}
    for context in plan.contexts:
        found: dict[str, _Work] = {}
        for task in plan.tasks:
            for sample in task.make(source, context, plan.count(task)):
                key = sample.prompt_hash
                missing = [variant for variant in plan.variants if (task.name, *variant.key, key) not in done]
                if missing:
                    found.setdefault(key, _Work(sample, [])).tasks.append((task, missing))
        yield from sorted(found.values(), key=lambda work: (work.sample.text, work.sample.prompt))


def _check_length(context: int, needed: int, longest: int | None) -> None:
    """Raise InputError where ``needed`` tokens are more than the model allows."""
    if isinstance(longest, int) and needed > longest:
        follows = f": {needed:,} tokens with the answer or forced steps" if needed > context else ""
        raise InputError(
            f"context {context:,}{follows}, the model's limit is {longest:,}",
            hint=f"use a context of at most {longest - needed + context:,}",
        )


def _record(
    task: Task, sample: Sample, variant: Variant, measured: Measured, source: Source, text_tokens: int
) -> Record:
    """Return the record of one sample. Its ``text_tokens`` is None where texts cannot overlap."""
    outcome = measured.outcome
    return {
        "task": task.name,
        "method": variant.method,
        "context": sample.context,
        "kv_memory": variant.kv_memory,
        "setting": variant.key[-1],
        "index": sample.index,
        "text_number": sample.text,
        "prompt_hash": sample.prompt_hash,
        "prompt_tokens": len(sample.prompt),
        "text_kind": task.text_kind or source.kind,
        "text_tokens": None if task.text_kind else text_tokens,
        **sample.labels,
        "score": task.score(sample, outcome),
        "expected": list(sample.answers),
        "answer": outcome.text,
        "kl": measured.kl,
        "mass": measured.mass,
        "same": outcome.same,
        "nll": outcome.nll,
        "sketch": measured.sketch,
        "reuse_rate": measured.reuse_rate,
        "kv_memory_limit_bytes": measured.kv_memory_limit_bytes,
        "kv_memory_peak_bytes": measured.kv_memory_peak_bytes,
    }


def _estimate(
    loaded: LoadedModel,
    config: Config,
    work: Sequence[_Work],
    prompts: PromptCache,
    *,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> Estimate:
    """Time a few forwards, and estimate the work from them."""
    longest = max((each.sample for each in work), key=lambda sample: len(sample.prompt))
    parts = inspect(loaded.model)
    elements = parts.kv_heads * parts.head_dim
    used = dict.fromkeys(variant for each in work for variant in each.variants)
    variants = [(each.method, each.configure(config, elements, longest.context)) for each in used]
    rates = measure_rates(loaded, variants, longest.prompt, on_progress=on_progress, on_notice=on_notice)

    def known(prompt: Prompt, before: Prompt) -> int:
        stored = prompts.stored_tokens(parts, config.chunk_tokens, prompt)
        return max(stored, prompts.reusable_tokens(parts, config.chunk_tokens, before, prompt))

    return estimate(rates, [(each.sample, each.variants) for each in work], known)


def _identity(loaded: LoadedModel, config: Config, source: Source) -> dict[str, Any]:
    """Return what must be equal for results to share one file."""
    text = hashlib.sha256("\0".join(text for _, text in source.passages).encode()).hexdigest()[:16]
    settings = {key: value for key, value in config.to_dict().items() if key not in MACHINE_SETTINGS}
    return {
        "model": loaded.short_name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights": loaded.weights,
        "config": settings,
        "seed": source.seed,
        "steps": source.steps,
        "text_kind": source.kind,
        "documents": [name for name, _ in source.passages] if source.kind == DOCUMENTS else [],
        "text_sha256": text,
        "kvswap_version": importlib.metadata.version("kvswap"),
    }


def _write(file: Path, identity: dict[str, Any], records: list[Record]) -> None:
    content = {
        "format": FORMAT,
        "identity": identity,
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "results": summarise(records),
        "samples": records,
    }
    write_json(file, content)
