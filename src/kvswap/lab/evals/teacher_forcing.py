"""Feed the same tokens to several caches of one model (teacher forcing), interleaved token by token.

Every cache gets the same prompt, then the same tokens one by one. All caches take a token before any takes the next,
and their order rotates from step to step, so that a machine that slows down does so for all. The first cache is the
reference that the others are compared with, usually ``DynamicCache`` or method ``full``.

Use this to measure times. ``cache_batch`` is faster where only predictions matter. One thread.
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
    """What one cache predicted, and how long it took, over S forced steps.

    Parameters
    ----------
    first_nll
        Negative log-likelihood of the first forced token, which the prompt predicts, in nats.
    step_s
        Seconds of each step.
    kl
        KL(reference || this) of the next-token distribution after each step, in nats.
    same
        Whether this cache and the reference have the same most likely token, after each step.
    nll
        Negative log-likelihood of the text's next token after each step but the last, in nats.
    expected
        For each forced token, the first included: whether it was this cache's most likely token.
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
        """Median seconds of a step."""
        return statistics.median(self.step_s)


def run_forced(
    model: Any,
    caches: Mapping[str, Any],
    ids: Sequence[int],
    steps: int,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, ForcedRun]:
    """Feed ``ids`` to each cache: all but the last ``steps`` tokens in one call, then those one by one.

    Parameters
    ----------
    caches
        Empty caches by name, from ``attach_each`` or transformers; the first is the reference.
    on_step
        Called with (calls done, calls in all).

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
    """Compute a prompt once, with the first cache (of method ``full``); the other caches adopt it.

    Returns
    -------
    Log-probabilities of the token after the prompt, float32 ``[V]``. Prefill is exact, so they hold for all caches.
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
    """Feed ``ids`` one by one to caches that hold the prompt, and record the steps in ``runs``.

    ``rows`` are the log-probabilities ``[V]`` that each cache predicts after the prompt.
    """
    names = list(caches)
    for name, run in runs.items():
        run.first_nll, run.expected = -float(rows[name][ids[0]]), [int(rows[name].argmax()) == ids[0]]
    for number, token in enumerate(ids):
        shift, after = (number + 1) % len(names), {}
        for name in names[shift:] + names[:shift]:
            after[name], took_s = _timed_call(model, [token], caches[name])
            runs[name].step_s.append(took_s)
        compare(runs, after, ids[number + 1] if number + 1 < len(ids) else None)
        if on_step is not None:
            on_step(number + 2, len(ids) + 1)


@torch.no_grad()
def _timed_call(model: Any, ids: list[int], cache: Any) -> tuple[torch.Tensor, float]:
    """Log-probabilities after the last of ``ids``, float32 ``[V]``, and the seconds of the forward."""
    tokens = torch.tensor([ids], device=model.device)
    start_s = time.perf_counter()
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    row = output.logits[0, -1].float().cpu()  # the copy waits until the device has finished
    return row.log_softmax(-1), time.perf_counter() - start_s


def compare(runs: Mapping[Key, ForcedRun], rows: Mapping[Key, torch.Tensor], following: int | None) -> None:
    """Compare the predictions after a step with the reference's, and append the results to ``runs``.

    ``rows`` are log-probabilities ``[V]``. ``following`` is the text's next token, None after the last step.
    """
    reference = rows[next(iter(runs))]
    for name, run in runs.items():
        kl = functional.kl_div(rows[name], reference, log_target=True, reduction="sum")
        run.kl.append(float(kl))
        run.same.append(bool(rows[name].argmax() == reference.argmax()))
        if following is not None:
            run.nll.append(-float(rows[name][following]))
            run.expected.append(int(rows[name].argmax()) == following)
