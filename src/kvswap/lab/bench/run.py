"""Run a benchmark: measure all methods on every context, batch and prompt, into a results file.

The file is replaced atomically after each batch of prompts. An interrupted run loses at most one of them; the same
command continues it. ``kvswap bench`` calls ``bench``. One thread.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvswap.config import AUTO_LEAST_TOKENS, Config
from kvswap.core.attach import attach_each
from kvswap.disk import create_backend
from kvswap.disk.files import filesystem_of, prepare_dir
from kvswap.disk.folders import kv_folder
from kvswap.disk.json_files import read_results, write_json
from kvswap.errors import ConfigError, InputError
from kvswap.lab.bench.interleaved import FULL, WARM_STEPS, run_interleaved
from kvswap.lab.bench.results import Record, record_of, summarise
from kvswap.lab.bench.variants import Variant, changed
from kvswap.lab.rivals.registry import with_methods
from kvswap.models.adapter import context_limit, inspect
from kvswap.models.identity import attention_fingerprint
from kvswap.models.loading import LoadedModel
from kvswap.tuning.machine import describe_machine
from kvswap.tuning.measure_disk import ReadTest, measure_reads

FORMAT = 1
Progress = Callable[[str, int, int], None]
Place = dict[str, int]
"""Keys context (tokens), batch (sequences) and prompt (number of the batch of prompts)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Each method gets ``repeat`` turns of ``new_tokens`` steps on each of ``prompts`` batches of prompts, for every
    context and batch size. ``methods`` are names; those of ``variants`` have their own configuration.
    """

    methods: Sequence[str]
    contexts: Sequence[int]
    batches: Sequence[int]
    new_tokens: int
    repeat: int
    prompts: int
    share_prompt: bool
    label: str = ""
    variants: Sequence[Variant] = ()

    @property
    def names(self) -> list[str]:
        """Names of the methods. ``full`` comes first, because the others are compared with it."""
        return [FULL, *(name for name in self.methods if name != FULL)]

    @property
    def steps(self) -> int:
        """Number of decode steps of each method on each batch of prompts."""
        return WARM_STEPS + self.new_tokens * self.repeat

    def variant(self, name: str) -> Variant | None:
        """Return the variant of this name, or None."""
        return next((each for each in self.variants if each.name == name), None)

    def choose(self, name: str, config: Config, place: Place) -> tuple[str, Config]:
        """Return the method behind a name and its configuration at ``place``; ``config`` is for all but variants."""
        variant = self.variant(name)
        if variant is not None:
            return variant.method, variant.config(place)
        if name != "kvswap":  # where M grows with the context, all others get that of a fast disk
            config = config.replace(select_tokens=config.selected_tokens(place["context"]))
        return name, config

    def places(self) -> Iterator[Place]:
        """Yield every combination of context, batch and prompt."""
        for context in self.contexts:
            for batch in self.batches:
                for prompt in range(self.prompts):
                    yield {"context": context, "batch": batch, "prompt": prompt}


def bench(
    loaded: LoadedModel,
    config: Config,
    plan: Plan,
    passages: Sequence[tuple[str, str]],
    *,
    file: Path,
    on_progress: Progress,
    on_notice: Callable[[str], None],
) -> dict[str, Any]:
    """Measure what is missing in ``file``; return the whole content of the file.

    ``passages`` are names and texts. They are joined, and prompts are cut from them.

    Raises
    ------
    ConfigError
        When ``file`` contains results of another model, configuration or plan, or a variant was tuned for another
        model.
    InputError
        When a context is longer than the model allows, or the text is too short.
    """
    content = _content(loaded, config, plan, file)
    records: list[Record] = content["records"]
    work = [(place, missing) for place in plan.places() if (missing := _missing(plan, records, place))]
    logger.debug("%d batches of prompts to measure, %d records in %s", len(work), len(records), file)
    ids = encode(loaded.tokenizer, passages)
    lengths = [_prompt_tokens(loaded, plan, place) for place, _ in work]
    pairs = zip(work, lengths, strict=True)
    batches = [stretch(ids, place, tokens, plan.steps, plan.prompts) for (place, _), tokens in pairs]
    if work:
        content["environment"].append(_environment(config, _read_test(config, on_notice)))
    for number, ((place, missing), prompt_tokens, batch) in enumerate(zip(work, lengths, batches, strict=True)):
        logger.debug("measuring %s at %s", ", ".join(missing), place)
        on_step = _step_counter(on_progress, number, len(work), len(missing) * plan.steps)
        methods = with_methods(plan.choose(name, config, place) for name in missing)
        with attach_each(loaded.model, methods, tokenizer=loaded.tokenizer, on_notice=on_notice) as caches:
            runs = run_interleaved(
                loaded.model,
                dict(zip(missing, caches, strict=True)),
                torch.tensor(batch),
                prompt_tokens=prompt_tokens,
                turns=plan.repeat,
                share_prompt=plan.share_prompt,
                on_step=on_step,
            )
        known = {"prompt_tokens": prompt_tokens, "environment": len(content["environment"]) - 1, **place}
        fresh = [name for name in missing if not _exists(records, place, name)]
        records += [record_of(name, {**known, **_own(plan, name, place)}, runs[name], runs.get(FULL)) for name in fresh]
        content["results"] = _with_ceiling(summarise(records), content["environment"][-1]["read_test"])
        write_json(file, content)
    return content


def encode(tokenizer: Any, passages: Sequence[tuple[str, str]]) -> list[int]:
    """Return the token ids of all texts, joined."""
    text = "\n\n".join(text for _, text in passages)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def stretch(ids: Sequence[int], place: Place, prompt_tokens: int, steps: int, prompts: int) -> list[list[int]]:
    """Cut the token ids of one batch: a prompt and forced tokens for each sequence.

    Sequences follow one another in the text. Where the text is too short for ``prompts`` such batches, they overlap
    evenly. Raises InputError when the text is too short for one sequence.
    """
    needed = prompt_tokens + steps
    if needed > len(ids):
        raise InputError(
            f"context {place['context']:,}: {needed:,} tokens of text are needed, there are {len(ids):,}",
            hint="add text with --document, or use a shorter context",
        )
    first = place["prompt"] * place["batch"]
    offset = min(needed, (len(ids) - needed) // max(1, prompts * place["batch"] - 1))
    return [list(ids[start * offset : start * offset + needed]) for start in range(first, first + place["batch"])]


def ceiling_bytes_per_s(test: dict[str, Any], read_bytes: float) -> float:
    """Return the rate that random reads of ``read_bytes`` can reach at depth 64, according to the read test.

    The rate is interpolated between the two sizes of the test. Smaller reads are limited by reads per second, larger
    ones by bytes per second.
    """
    small, large = test["small"], test["large"]
    low, high = small["read_bytes"], large["read_bytes"]
    if read_bytes <= low:
        return float(small["bytes_per_s"] * read_bytes / low)
    share = min(1.0, (read_bytes - low) / (high - low))
    return float(small["bytes_per_s"] + share * (large["bytes_per_s"] - small["bytes_per_s"]))


def step_over_bound(row: Record) -> float:
    """Return the time of a step relative to its lower bound.

    The bound is the longer of two times: the step without its wait for reads, and its bytes at the ceiling's rate. The
    result is 1 where computation hides all reads.
    """
    step_s = row["batch"] / row["decode_tokens_per_s"]
    reading_s = row["batch"] * row["read_bytes_per_token"] / row["ceiling_bytes_per_s"]
    return float(step_s / max(step_s * (1 - row["exposed_wait_fraction"]), reading_s))


def _step_counter(on_progress: Progress, number: int, batches: int, steps: int) -> Callable[[], None]:
    """Return a function that counts a step of batch ``number`` of ``batches`` and reports hundredths of each batch."""
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress("bench", number * 100 + 100 * done // steps, batches * 100)

    return on_step


def _with_ceiling(rows: list[Record], test: dict[str, Any]) -> list[Record]:
    """Add the disk's ceiling and the distance to the bound to rows of methods that read."""
    for row in rows:
        size = row["read_size_bytes"]
        row["ceiling_bytes_per_s"] = ceiling_bytes_per_s(test, size) if size else None
        row["step_over_bound"] = step_over_bound(row) if size else None
    return rows


def _exists(records: Sequence[Record], place: Place, method: str) -> bool:
    key = {**place, "method": method}
    return any(all(record[name] == value for name, value in key.items()) for record in records)


def _missing(plan: Plan, records: Sequence[Record], place: Place) -> list[str]:
    """Return ``full`` and the methods without a record at ``place``; nothing where all have one."""
    missing = [name for name in plan.names if not _exists(records, place, name)]
    return list(dict.fromkeys([FULL, *missing])) if missing else []


def _prompt_tokens(loaded: LoadedModel, plan: Plan, place: Place) -> int:
    """Return the tokens of each prompt: the context, or less where the steps after it would exceed the model's limit.

    Raises InputError for a context that is longer than the model allows.
    """
    limit = context_limit(loaded.model)
    context = place["context"]
    if isinstance(limit, int) and context > limit:
        raise InputError(f"context {context:,}: the model's limit is {limit:,} tokens", hint="use a shorter context")
    return min(context, limit - plan.steps) if isinstance(limit, int) else context


def _read_test(config: Config, on_notice: Callable[[str], None]) -> ReadTest:
    folder = prepare_dir(kv_folder(config.kv_dir))
    return measure_reads(create_backend(config.backend, folder, config.read_depth, on_notice=on_notice))


def _content(loaded: LoadedModel, config: Config, plan: Plan, file: Path) -> dict[str, Any]:
    """Read the results file, or begin its content. Raises ConfigError for results of another benchmark."""
    identity = _identity(loaded, config, plan)
    empty = {"format": FORMAT, "identity": identity, "environment": [], "results": [], "records": []}
    older = {"config": _settings(Config(select_tokens=AUTO_LEAST_TOKENS)), "weights": "auto"}
    content = read_results(file, empty, kind="a benchmark", older=older)
    _add_variants(loaded, content["identity"], plan.variants, file)
    return content


def _identity(loaded: LoadedModel, config: Config, plan: Plan) -> dict[str, Any]:
    """Return what must be equal for results to share one file."""
    return {
        "model": loaded.short_name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights": loaded.weights,
        "config": _settings(config),
        "new_tokens": plan.new_tokens,
        "repeat": plan.repeat,
        "prompts": plan.prompts,
        "share_prompt": plan.share_prompt,
        "label": plan.label,
    }


def _settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "kv_dir"}


def _add_variants(loaded: LoadedModel, identity: dict[str, Any], variants: Sequence[Variant], file: Path) -> None:
    """Add the variants to the identity of a file. Raises ConfigError where a name has another configuration there."""
    known = dict(identity.get("variants", {}))
    for variant in variants:
        variant.check_model(attention_fingerprint(inspect(loaded.model)))
        if known.setdefault(variant.name, variant.identity()) != variant.identity():
            raise ConfigError(
                f"results file {file}: its {variant.name} had another configuration",
                hint="rename the configuration file, or give another --json file",
            )
    if known:
        identity["variants"] = known


def _own(plan: Plan, name: str, place: Place) -> dict[str, Any]:
    """Return what a variant's record says about its configuration: the keys with other values than the defaults."""
    variant = plan.variant(name)
    return {} if variant is None else {"config": changed(variant.config(place))}


def _environment(config: Config, test: ReadTest) -> dict[str, Any]:
    """Describe the machine, the folder's file system and the result of the read test."""
    values = dataclasses.asdict(test)
    for name, rate in (("small", test.small), ("large", test.large), ("single", test.single)):
        values[name] |= {"bytes_per_s": rate.bytes_per_s, "reads_per_s": rate.reads_per_s}
    return {
        "machine": dataclasses.asdict(describe_machine()),
        "threads": torch.get_num_threads(),
        "filesystem": filesystem_of(kv_folder(config.kv_dir)),
        "read_test": values,
        "versions": {name: importlib.metadata.version(name) for name in ("kvswap", "torch", "transformers", "numpy")},
    }
