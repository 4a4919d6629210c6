"""``kvswap.tune``: find configurations for a model under a memory limit, with predictions and reasons.

It obtains a profile and tables (given, cached, or measured now), runs the search for each context, and returns the
solutions. ``kvswap tune`` calls it. One thread, which must be the one that runs the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvswap.config import Config
from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError, StorageError
from kvswap.models.adapter import inspect
from kvswap.models.loading import LoadedModel, load_model
from kvswap.tuning.cost import ModelFacts
from kvswap.tuning.explain import reasons
from kvswap.tuning.measure_disk import Progress
from kvswap.tuning.measure_model import model_facts
from kvswap.tuning.measure_tables import measure_tables
from kvswap.tuning.profile import Profile, cached_path, load_profile, take_profile
from kvswap.tuning.search import Candidate, Prefer, Pricing, Request, search
from kvswap.tuning.solution import Prediction, Solution, TunedConfig
from kvswap.tuning.tables import GROUPS, Tables, cached_tables, load_tables
from kvswap.units import parse_bytes

logger = logging.getLogger(__name__)


def tune(
    model: str | LoadedModel,
    *,
    kv_memory: int | str,
    context_tokens: int | Sequence[int],
    batch: int = 1,
    prefer: Prefer = "quality",
    select_tokens: int | None = None,
    kv_dir: str | None = None,
    profile: str | Path | Profile | None = None,
    tables: str | Path | Tables | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> TunedConfig:
    """Find sketch size, group size, selection by layer and reuse memory under a memory limit.

    Parameters
    ----------
    model
        A model as ``kvswap.load`` takes it, or one that is loaded already.
    kv_memory, batch
        The memory limit for all ``batch`` sequences together. Speed is measured for one sequence and extrapolated.
    context_tokens
        Longest context in tokens, or several: each gets a solution of its own.
    prefer
        ``"quality"``: the best KL among the nearly fastest. ``"speed"``: the fastest among those of nearly the best KL.
    select_tokens
        M, the tokens attended to, as the mean over layers. None is as many as without tuning: they grow with the
        context, and depend on the disk.
    profile, tables
        Measurements, or their files. By default the cached ones; where there are none, they are measured now, which
        takes a minute for a profile and several for tables.
    force
        Accept a profile and tables from another machine, model or version.
    on_progress
        Called with ``("disk" | "model" | "calibrate" | "tables" | "tune", done, total)``.

    Raises ConfigError, ModelError, StorageError, MemoryBudgetError.
    """
    requests = _requests(kv_memory, context_tokens, batch, prefer, select_tokens)
    notice = on_notice or (lambda text: None)
    loaded = load_model(model, on_notice=notice) if isinstance(model, str) else model
    facts = model_facts(loaded, inspect(loaded.model))
    _check_contexts(requests, facts)
    known = find_profile(loaded, facts, profile, kv_dir, force=force, on_progress=on_progress, on_notice=notice)
    measured = find_tables(loaded, facts, tables, force=force, on_progress=on_progress, on_notice=notice)
    pricing = Pricing(known, measured, facts, loaded.model.device)
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
    """Return the given profile, or the cached one, or measure one now and cache it.

    Raises ConfigError for a given file that is damaged, of another machine or model, or without model costs.
    """
    if given is not None:
        found = given if isinstance(given, Profile) else load_profile(given, kv_dir, facts, force=force)
        if found.costs is None:
            raise ConfigError(
                f"{'profile' if isinstance(given, Profile) else given}: no model costs in it",
                hint="measure the model too: run `kvswap profile --model MODEL --json FILE`",
            )
        logger.debug("profile: given, measured %s", found.made)
        return found
    try:
        path = cached_path(facts.fingerprint, kv_dir)
        found = load_profile(path, kv_dir, facts)
        logger.debug("profile: from the cache, %s, measured %s", path, found.made)
        return found
    except (ConfigError, StorageError) as error:  # missing, outdated or damaged: it is measured again
        logger.debug("profile: measured now, because the cached one cannot be used: %s", error.message)
    found = take_profile(kv_dir, loaded, on_progress=on_progress)
    try:
        found.save(cached_path(facts.fingerprint, kv_dir))
    except (ConfigError, StorageError) as error:
        on_notice(f"the profile cannot be stored, so the next run measures it again: {error}")
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
    """Return the given tables, or the cached ones, or measure them now and cache them.

    Where ``given`` is a file that does not exist yet, new tables are written there. Raises ConfigError for a given file
    that is damaged or of another model or version.
    """
    if isinstance(given, Tables):
        return given
    if given is not None and user_path(given).exists():
        return load_tables(given, facts.fingerprint, facts.layers, force=force)
    if given is not None:
        found = measure_tables(loaded, on_progress=on_progress)
        found.save(given)
        return found
    try:
        path = cached_tables(facts.fingerprint)
        found = load_tables(path, facts.fingerprint, facts.layers)
        logger.debug("tables: from the cache, %s", path)
        return found
    except (ConfigError, StorageError) as error:
        logger.debug("tables: measured now, because the cached ones cannot be used: %s", error.message)
    found = measure_tables(loaded, on_progress=on_progress)
    try:
        found.save(cached_tables(facts.fingerprint))
    except (ConfigError, StorageError) as error:
        on_notice(f"the tables cannot be stored, so the next run measures them again: {error}")
    return found


def prediction_of(chosen: Candidate) -> Prediction:
    """Return what a candidate is predicted to do, as it stands in a solution."""
    cost = chosen.cost
    return Prediction(
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
        kl_bound=chosen.kl_bound,
        memory_parts=chosen.memory_parts,
    )


def _values(config: Config, kv_dir: str | None) -> dict[str, object]:
    """Return the tuned keys of a configuration, and the others that differ from the defaults."""
    plain = Config().to_dict()
    tuned = ("kv_memory", "group_tokens", "select_tokens", "layer_select_tokens", "sketch_rank", "sketch_bits")
    values = {key: value for key, value in config.to_dict().items() if key in tuned or value != plain[key]}
    if values["layer_select_tokens"] is not None:
        values["layer_select_tokens"] = list(values["layer_select_tokens"])
    return values | ({"kv_dir": kv_dir} if kv_dir is not None else {})


def _solve(
    pricing: Pricing, requests: list[Request], prefer: Prefer, kv_dir: str | None, on_progress: Progress | None
) -> list[Solution]:
    """Search each request, reporting progress over all of them."""
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
        prediction=prediction_of(chosen),
        reasons=lines,
    )


def _requests(
    kv_memory: int | str, context_tokens: int | Sequence[int], batch: int, prefer: str, select_tokens: int | None
) -> list[Request]:
    """Check the arguments before a model is loaded; return a request for each context. Raises ConfigError."""
    limit_bytes = parse_bytes(kv_memory, name="kv_memory")
    contexts = [context_tokens] if isinstance(context_tokens, int) else list(context_tokens)
    if prefer not in ("quality", "speed"):
        raise ConfigError(f"prefer: got {prefer!r}", hint="use quality or speed")
    if not contexts:
        raise ConfigError("context: none was given", hint="give the longest context to work with")
    for name, value in (("batch", batch), *(("context", each) for each in contexts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: got {value!r}", hint="give an integer from 1 up")
    if select_tokens is not None:
        Config(select_tokens=select_tokens, group_tokens=max(GROUPS))  # raises where it leaves nothing to select
    return [
        Request(limit_bytes=limit_bytes, context_tokens=context, batch=batch, select_tokens=select_tokens)
        for context in contexts
    ]


def _check_contexts(requests: list[Request], facts: ModelFacts) -> None:
    """Raise ConfigError for a context that is longer than the model allows."""
    for request in requests:
        if facts.longest_tokens and request.context_tokens > facts.longest_tokens:
            raise ConfigError(
                f"context: {request.context_tokens:,} tokens are more than the model's limit of "
                f"{facts.longest_tokens:,}",
                hint="tune for a shorter context",
            )
