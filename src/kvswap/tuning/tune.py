"""``kvswap.tune``: from a model and a memory limit to configurations, with what they promise and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvswap.config import Config
from kvswap.errors import ConfigError, StorageError
from kvswap.models.adapter import inspect
from kvswap.models.loading import LoadedModel, load_model
from kvswap.tuning.disk_curve import Progress
from kvswap.tuning.explain import reasons
from kvswap.tuning.make_tables import make_tables
from kvswap.tuning.model_costs import model_facts
from kvswap.tuning.profile import ModelFacts, Profile, cached_path, load_profile, take_profile
from kvswap.tuning.tables import GROUPS, Tables, cached_tables, load_tables
from kvswap.tuning.tuned import Promise, Solution, TunedConfig
from kvswap.tuning.tuner import Candidate, Prefer, Pricing, Request, search
from kvswap.units import parse_bytes


def tune(
    model: str | LoadedModel,
    *,
    kv_memory: int | str,
    context_tokens: int | Sequence[int],
    batch: int = 1,
    prefer: Prefer = "quality",
    select_tokens: int = 400,
    kv_dir: str | None = None,
    profile: str | Path | Profile | None = None,
    tables: str | Path | Tables | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> TunedConfig:
    """Find sketch, group size, selection of each layer and room for reuse under a memory limit.

    Parameters
    ----------
    model
        As for ``load``.
    kv_memory, batch
        One limit for all sequences that are decoded together. Speed is measured for one and extrapolated.
    context_tokens
        Longest context to work with, or several: each gets a solution of its own.
    prefer, select_tokens
        ``"quality"``: the best that is nearly as fast as the fastest; ``"speed"``: the fastest that is nearly as good.
        M in the mean over layers.
    profile, tables, force
        What was measured before; by default what the cache folder has, or measured now: a profile takes about a
        minute, tables some minutes, once a model. ``force`` takes those of another machine, model or version.
    on_progress
        Called with ``("disk" | "model" | "calibrate" | "tables" | "tune", done, total)``.

    Raises
    ------
    ConfigError, ModelError, StorageError, MemoryBudgetError
    """
    limit_bytes = parse_bytes(kv_memory, name="kv_memory")
    contexts = [context_tokens] if isinstance(context_tokens, int) else list(context_tokens)
    notice = on_notice or (lambda text: None)
    _check(contexts, batch, prefer, select_tokens)
    loaded = load_model(model, on_notice=notice) if isinstance(model, str) else model
    facts = model_facts(loaded, inspect(loaded.model))
    _check_reach(contexts, facts)
    known = find_profile(loaded, facts, profile, kv_dir, force=force, on_progress=on_progress, on_notice=notice)
    measured = find_tables(loaded, facts, tables, force=force, on_progress=on_progress, on_notice=notice)
    pricing = Pricing(known, measured, facts, loaded.model.device)
    requests = [
        Request(limit_bytes=limit_bytes, context_tokens=context, batch=batch, select_tokens=select_tokens)
        for context in contexts
    ]
    return TunedConfig(
        model=facts.name,
        fingerprint=facts.fingerprint,
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        disk=f"{known.stamp.disk}, {known.disk.backend}, profile of {known.made}",
        prefer=prefer,
        solutions=_solve(pricing, requests, prefer, kv_dir, on_progress),
    )


def find_profile(
    loaded: LoadedModel,
    facts: ModelFacts,
    given: str | Path | Profile | None,
    kv_dir: str | None,
    *,
    force: bool,
    on_progress: Progress | None,
    on_notice: Callable[[str], None],
) -> Profile:
    """The profile that was given, or the cached one, or one measured now (and cached)."""
    if isinstance(given, Profile):
        return given
    if given is not None:
        found = load_profile(given, kv_dir, facts, force=force)
        if found.costs is None:
            raise ConfigError(f"{given}: a profile without a model", hint="run `kvswap profile --model`")
        return found
    try:
        return load_profile(cached_path(facts.fingerprint, kv_dir), kv_dir, facts)
    except (ConfigError, StorageError):  # none, of an older version, or damaged: it is ours to measure again
        found = take_profile(kv_dir, loaded, on_progress=on_progress)
    try:
        found.save(cached_path(facts.fingerprint, kv_dir))
    except (ConfigError, StorageError) as error:
        on_notice(f"the profile cannot be kept, so the next run measures it again: {error}")
    return found


def find_tables(
    loaded: LoadedModel,
    facts: ModelFacts,
    given: str | Path | Tables | None,
    *,
    force: bool,
    on_progress: Progress | None,
    on_notice: Callable[[str], None],
) -> Tables:
    """The tables that were given, or the cached ones, or some computed now (and cached)."""
    if isinstance(given, Tables):
        return given
    if given is not None and Path(given).expanduser().exists():
        return load_tables(given, facts.fingerprint, facts.layers, force=force)
    if given is not None:
        found = make_tables(loaded, on_progress=on_progress)
        found.save(given)
        return found
    try:
        return load_tables(cached_tables(facts.fingerprint), facts.fingerprint, facts.layers)
    except (ConfigError, StorageError):  # as above
        found = make_tables(loaded, on_progress=on_progress)
    try:
        found.save(cached_tables(facts.fingerprint))
    except (ConfigError, StorageError) as error:
        on_notice(f"the tables cannot be kept, so the next run computes them again: {error}")
    return found


def promise_of(chosen: Candidate) -> Promise:
    """What a candidate is expected to do."""
    cost = chosen.cost
    return Promise(
        tokens_per_s=cost.tokens_per_s,
        compute_s=cost.compute_s,
        predict_s=cost.predict_s,
        slots_s=cost.slots_s,
        submit_s=cost.submit_s,
        wait_s=cost.wait_s,
        reads=cost.reads,
        read_bytes=cost.read_bytes,
        reuse_rate=chosen.traffic.reuse_rate,
        expected_kl=chosen.expected_kl,
        promised_kl=chosen.promised_kl,
        memory_parts=chosen.memory_parts,
    )


def _values(config: Config, kv_dir: str | None) -> dict[str, object]:
    """Keys that differ from the defaults, with those that were tuned."""
    plain = Config().to_dict()
    tuned = ("kv_memory", "group_tokens", "select_tokens", "layer_select_tokens", "sketch_rank", "sketch_bits")
    values = {key: value for key, value in config.to_dict().items() if key in tuned or value != plain[key]}
    if values["layer_select_tokens"] is not None:
        values["layer_select_tokens"] = list(values["layer_select_tokens"])
    return values | ({"kv_dir": kv_dir} if kv_dir is not None else {})


def _solve(
    pricing: Pricing, requests: list[Request], prefer: Prefer, kv_dir: str | None, on_progress: Progress | None
) -> list[Solution]:
    solutions = []
    for number, request in enumerate(requests):

        def step(done: int, total: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress("tune", number * total + done, len(requests) * total)

        chosen, found = search(pricing, request, prefer=prefer, on_step=step)
        lines = reasons(chosen, found, pricing.profile.disk, pricing.facts.layers)
        solutions.append(_solution(request, chosen, lines, kv_dir))
    return solutions


def _solution(request: Request, chosen: Candidate, lines: list[str], kv_dir: str | None) -> Solution:
    return Solution(
        batch=request.batch,
        context_tokens=request.context_tokens,
        values=_values(chosen.config, kv_dir),
        promise=promise_of(chosen),
        reasons=lines,
    )


def _check(contexts: list[int], batch: int, prefer: str, select_tokens: int) -> None:
    """What can be wrong before a model is loaded. Raises ConfigError."""
    if prefer not in ("quality", "speed"):
        raise ConfigError(f"prefer: got {prefer!r}", hint="use quality or speed")
    if not contexts:
        raise ConfigError("context: none was given", hint="give the longest context to work with")
    for name, value in (("batch", batch), *(("context", each) for each in contexts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: got {value!r}", hint="give an integer from 1 up")
    Config(select_tokens=select_tokens, group_tokens=max(GROUPS))  # raises where it leaves nothing to select


def _check_reach(contexts: list[int], facts: ModelFacts) -> None:
    for context in contexts:
        if facts.longest_tokens and context > facts.longest_tokens:
            raise ConfigError(
                f"context: {context:,} tokens are more than the model's limit of {facts.longest_tokens:,}",
                hint="tune for a shorter context",
            )
