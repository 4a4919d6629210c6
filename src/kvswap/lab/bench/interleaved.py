"""Run several methods on one prompt, interleaved: A B C, A B C, ..., so that a machine that drifts drifts for all.

A *turn* is a block of consecutive decode steps of one method. In each round every method has one turn. ``full`` goes
first, because the others are compared with its predictions; the order of the others rotates from round to round. All
methods take the same forced tokens, so that they are always at the same position of the same text.

``bench.run`` calls this. One thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from kvswap.core.cache_stats import CacheStats
from kvswap.models.adapter import cache_keyword

WARM_STEPS = 4  # of each method before its first turn: they touch memory, fill slots and set up the matrix libraries
FULL = "full"


@dataclass(slots=True, kw_only=True)
class Turn:
    """A block of steps of one method.

    Parameters
    ----------
    step_s
        Seconds of each step, the model's head included.
    kl, same
        Means over steps for the first sequence of the batch: KL(full || method) in nats, and the share of steps where
        both have the same most likely token. None without ``full``.
    spent
        Growth of ``CacheStats`` during the turn, by field.
    """

    step_s: list[float]
    kl: float | None = None
    same: float | None = None
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class MethodRun:
    """One method on one batch of prompts. ``prefill_s`` is None where the cache adopted the prompt of ``full``."""

    prefill_s: float | None
    turns: list[Turn] = field(default_factory=list)
    stats: CacheStats | None = None


def run_interleaved(
    model: Any,
    caches: Mapping[str, Any],
    ids: torch.Tensor,
    *,
    prompt_tokens: int,
    turns: int,
    share_prompt: bool,
    on_step: Callable[[], None],
) -> dict[str, MethodRun]:
    """Feed ``ids`` to every cache: the prompt as one call, then the other tokens one by one, interleaved.

    Parameters
    ----------
    caches
        Empty caches by name. If ``full`` is among them, the others are compared with it and may adopt its prompt.
    ids
        int64 token ids ``[B, prompt_tokens + WARM_STEPS + turns * steps]``.
    turns
        Turns of each method.
    share_prompt
        Compute the prompt once, with ``full``; the other caches adopt it.
    on_step
        Called after every step of every cache.
    """
    prompt, forced = ids[:, :prompt_tokens], ids[:, prompt_tokens:]
    names = [FULL] * (FULL in caches) + [name for name in caches if name != FULL]
    runs = {}
    for name in names:
        if share_prompt and name != FULL:
            caches[name].adopt(caches[FULL])
            runs[name] = MethodRun(prefill_s=None)
        else:
            runs[name] = MethodRun(prefill_s=timed_call(model, prompt, caches[name])[1])
    for name in names:
        for token in forced[:, :WARM_STEPS].unbind(1):
            timed_call(model, token[:, None], caches[name])
            on_step()
    steps = (forced.shape[1] - WARM_STEPS) // turns
    others = [name for name in names if name != FULL]
    for number in range(turns):
        start = WARM_STEPS + number * steps
        tokens = forced[:, start : start + steps]
        shift = number % max(1, len(others))
        reference: list[torch.Tensor] = []
        for name in names[: len(names) - len(others)] + others[shift:] + others[:shift]:
            turn, rows = _run_turn(model, tokens, caches[name], on_step)
            if name == FULL:
                reference = rows
            if reference:
                _compare(turn, rows, reference)
            runs[name].turns.append(turn)
    for name, run in runs.items():
        run.stats = caches[name].stats
    return runs


def growth(before: CacheStats, after: CacheStats) -> dict[str, float]:
    """Return how much each counter and time grew. ``reused_groups`` are the selected groups that were in memory."""
    names = [each.name for each in dataclasses.fields(CacheStats) if each.name.endswith("_s")]
    names += ["disk_read_bytes", "disk_reads", "selected_groups"]
    found = {name: getattr(after, name) - getattr(before, name) for name in names}
    reused = [stats.reuse_rate * stats.selected_groups for stats in (before, after)]
    found["reused_groups"] = reused[1] - reused[0]
    return found


def _run_turn(
    model: Any, tokens: torch.Tensor, cache: Any, on_step: Callable[[], None]
) -> tuple[Turn, list[torch.Tensor]]:
    """Feed ``tokens`` ``[B, steps]`` one by one; return the turn and the logits ``[V]`` after each step."""
    before, times_s, rows = cache.stats, [], []
    for token in tokens.unbind(1):
        row, took_s = timed_call(model, token[:, None], cache)
        times_s.append(took_s)
        rows.append(row)
        on_step()
    return Turn(step_s=times_s, spent=growth(before, cache.stats)), rows


@torch.no_grad()
def timed_call(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, float]:
    """Logits of the first sequence after the last of ``ids``, float32 ``[V]``, and the seconds of the forward."""
    start_s = time.perf_counter()
    output = model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    row = output.logits[0, -1].float().cpu()  # the copy waits until the device has finished
    return row, time.perf_counter() - start_s


def _compare(turn: Turn, rows: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> None:
    """Set ``kl`` and ``same`` of a turn from logits ``[V]`` by step."""
    pairs = [(row.log_softmax(-1), other.log_softmax(-1)) for row, other in zip(rows, reference, strict=True)]
    kl = [float(functional.kl_div(row, other, log_target=True, reduction="sum")) for row, other in pairs]
    turn.kl = sum(kl) / len(kl)
    turn.same = sum(bool(row.argmax() == other.argmax()) for row, other in pairs) / len(pairs)
