"""Several caches of one model beside each other, fed the same tokens in turns.

Every cache takes the same prompt and then the same tokens one by one (teacher-forced), each token by all of them before
the next, in an order that turns from step to step: a machine that slows down does so for all. The first cache is what
the others are compared with, as a rule ``DynamicCache`` or method ``full``. One thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn import functional

from kvswap.models.adapter import cache_keyword

Key = TypeVar("Key")


@dataclass(slots=True, kw_only=True)
class ForcedRun:
    """What one cache did on one text of S steps.

    ``kl[s]`` is KL(reference || this) of the next-token distribution in nats, ``same[s]`` whether both think the same
    token likeliest, ``nll[s]`` the negative log-likelihood of the text's next token (one entry fewer). ``first_nll`` is
    that of the first forced token, which the prompt predicts. ``expected``: for each forced token, the first one
    included, whether it was this cache's likeliest.
    """

    prefill_s: float = 0.0
    first_nll: float = 0.0
    step_s: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    expected: list[bool] = field(default_factory=list)

    @property
    def median_step_s(self) -> float:
        """Median time of a step."""
        return statistics.median(self.step_s)


def run_forced(
    model: Any,
    caches: Mapping[str, Any],
    ids: Sequence[int],
    steps: int,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, ForcedRun]:
    """Feed ``ids`` to each cache: all but the last ``steps`` at once, those one by one.

    Parameters
    ----------
    caches
        Caches by name, as ``attach_each`` or transformers give them, all empty; the first is the reference.
    on_step
        Called with ``(calls done, calls in all)``.

    Returns
    -------
    The runs by name, in the order of ``caches``.
    """
    prompt, forced = list(ids[:-steps]), list(ids[-steps:])
    runs, rows = {name: ForcedRun() for name in caches}, {}
    for name, cache in caches.items():
        rows[name], runs[name].prefill_s = _timed_call(model, prompt, cache)
    if on_step is not None:
        on_step(1, steps + 1)
    force(model, caches, forced, rows, runs, on_step=on_step)
    return runs


def share_prompt(model: Any, caches: Sequence[Any], ids: Sequence[int]) -> torch.Tensor:
    """Compute a prompt once, with the first cache (of method ``full``); the others adopt it.

    Returns
    -------
    Log-probabilities ``[V]`` float32 of the token after the prompt. Prefill is exact, so they are those of all caches.
    """
    row, _ = _timed_call(model, list(ids), caches[0])
    for cache in caches[1:]:
        cache.adopt(caches[0])
    return row


def force(
    model: Any,
    caches: Mapping[str, Any],
    ids: Sequence[int],
    rows: Mapping[str, torch.Tensor],
    runs: dict[str, ForcedRun],
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Feed ``ids`` one by one to caches that hold the prompt; ``rows`` are what they predict after it."""
    names = list(caches)
    for name, run in runs.items():
        run.first_nll, run.expected = -float(rows[name][ids[0]]), [int(rows[name].argmax()) == ids[0]]
    for number, token in enumerate(ids):
        turn, after = (number + 1) % len(names), {}
        for name in names[turn:] + names[:turn]:
            after[name], took_s = _timed_call(model, [token], caches[name])
            runs[name].step_s.append(took_s)
        judge(runs, after, ids[number + 1] if number + 1 < len(ids) else None)
        if on_step is not None:
            on_step(number + 2, len(ids) + 1)


@torch.no_grad()
def _timed_call(model: Any, ids: list[int], cache: Any) -> tuple[torch.Tensor, float]:
    """Log-probabilities ``[V]`` float32 after the last of ``ids``, and the seconds of the forward."""
    tokens = torch.tensor([ids], device=model.device)
    start_s = time.perf_counter()
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    row = output.logits[0, -1].float().cpu()  # waits for a device
    return row.log_softmax(-1), time.perf_counter() - start_s


def judge(runs: Mapping[Key, ForcedRun], rows: Mapping[Key, torch.Tensor], following: int | None) -> None:
    """Note what each predicts after a step, log-probabilities ``[V]``; ``following`` is the text's next token."""
    reference = rows[next(iter(runs))]
    for name, run in runs.items():
        kl = functional.kl_div(rows[name], reference, log_target=True, reduction="sum")
        run.kl.append(float(kl))
        run.same.append(bool(rows[name].argmax() == reference.argmax()))
        if following is not None:
            run.nll.append(-float(rows[name][following]))
            run.expected.append(int(rows[name].argmax()) == following)
