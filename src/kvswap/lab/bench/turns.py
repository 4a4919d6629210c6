"""One prompt through several methods in turns: A B C A B C, each turn some decode steps of one method.

Every method takes the same forced tokens, so that all of them are at the same place of the same text. ``full`` goes
first in each turn, since the others are judged by what it predicts; the order of the others turns. One thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from kvswap.core.trace import CacheStats
from kvswap.models.adapter import cache_keyword

WARM_STEPS = 4  # of each method before its first turn: touched memory, filled slots, prepared matrix libraries
FULL = "full"


@dataclass(slots=True, kw_only=True)
class Turn:
    """Some steps of one method. ``kl`` (nats, mean over steps) and ``same`` are those of the first sequence.

    ``step_s``: each step, the model's head included. ``spent``: what happened meanwhile, as growth of ``CacheStats``.
    """

    step_s: list[float]
    kl: float | None = None
    same: float | None = None
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class MethodRun:
    """One method on one batch of prompts. ``prefill_s`` is None where the prompt was taken over from ``full``."""

    prefill_s: float | None
    turns: list[Turn] = field(default_factory=list)
    stats: CacheStats | None = None


def run_turns(
    model: Any,
    caches: Mapping[str, Any],
    ids: torch.Tensor,
    *,
    prompt_tokens: int,
    turns: int,
    share_prompt: bool,
    on_step: Callable[[], None],
) -> dict[str, MethodRun]:
    """Feed ``ids`` to every cache: the prompt at once, then the rest one by one in turns.

    Parameters
    ----------
    caches
        Empty caches by name. With ``full``, the others are judged by it, and may share its prompt.
    ids
        ``[B, prompt_tokens + WARM_STEPS + turns * steps]`` int64 token ids.
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
            runs[name] = MethodRun(prefill_s=_call(model, prompt, caches[name])[1])
    for name in names:
        for token in forced[:, :WARM_STEPS].unbind(1):
            _call(model, token[:, None], caches[name])
            on_step()
    steps = (forced.shape[1] - WARM_STEPS) // turns
    for number in range(turns):
        start = WARM_STEPS + number * steps
        tokens = forced[:, start : start + steps]
        others = [name for name in names if name != FULL]
        shift = number % max(1, len(others))
        reference: list[torch.Tensor] = []
        for name in names[: len(names) - len(others)] + others[shift:] + others[:shift]:
            turn, rows = _turn(model, tokens, caches[name], on_step)
            if name == FULL:
                reference = rows
            if reference:
                _judge(turn, rows, reference)
            runs[name].turns.append(turn)
    for name, run in runs.items():
        run.stats = caches[name].stats
    return runs


def _turn(model: Any, tokens: torch.Tensor, cache: Any, on_step: Callable[[], None]) -> tuple[Turn, list[torch.Tensor]]:
    before, times, rows = cache.stats, [], []
    for token in tokens.unbind(1):
        row, took_s = _call(model, token[:, None], cache)
        times.append(took_s)
        rows.append(row)
        on_step()
    return Turn(step_s=times, spent=growth(before, cache.stats)), rows


@torch.no_grad()
def _call(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, float]:
    """Logits ``[V]`` float32 of the first sequence after the last of ``ids``, and the seconds of the forward."""
    start_s = time.perf_counter()
    output = model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    row = output.logits[0, -1].float().cpu()  # waits for a device
    return row, time.perf_counter() - start_s


def _judge(turn: Turn, rows: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> None:
    pairs = [(row.log_softmax(-1), other.log_softmax(-1)) for row, other in zip(rows, reference, strict=True)]
    kl = [float(functional.kl_div(row, other, log_target=True, reduction="sum")) for row, other in pairs]
    turn.kl = sum(kl) / len(kl)
    turn.same = sum(bool(row.argmax() == other.argmax()) for row, other in pairs) / len(pairs)


def growth(before: CacheStats, after: CacheStats) -> dict[str, float]:
    """How much each counter and time of the statistics grew; hits among the selected groups as ``reused_groups``."""
    names = [each.name for each in dataclasses.fields(CacheStats) if each.name.endswith("_s")]
    names += ["disk_read_bytes", "disk_reads", "selected_groups"]
    found = {name: getattr(after, name) - getattr(before, name) for name in names}
    hits = (stats.reuse_rate * stats.selected_groups for stats in (after, before))
    found["reused_groups"] = next(hits) - next(hits)
    return found
