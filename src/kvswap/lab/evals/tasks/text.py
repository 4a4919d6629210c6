"""Real text, teacher-forced: how far the next-token distribution is from that of full attention. Cheap and sensitive.

``agreement`` scores the share of steps in which both think the same token likeliest. ``perplexity`` scores the
geometric mean of the probability of the text's own tokens, 1 / perplexity. Both take the same samples, which are then
computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvswap.errors import InputError
from kvswap.lab.evals.samples import Outcome, Sample, Source, Task


def stretches(source: Source, context: int, count: int) -> Iterator[Sample]:
    """``count`` stretches of ``context`` tokens and the steps after them, spread over all the text."""
    ids: list[int] = []
    wanted = (context + source.steps) * count
    for _, text in source.passages:
        ids += source.tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    spare = len(ids) - context - source.steps
    if spare < 0:
        raise InputError(f"context {context:,}: there are {len(ids):,} tokens of text", hint="add text with --document")
    for index in range(count):
        start = spare * index // max(1, count - 1)
        stop = start + context
        yield Sample(
            context=context,
            index=index,
            text=index,
            prompt=tuple(ids[start:stop]),
            forced=tuple(ids[stop : stop + source.steps]),
        )


def _same(sample: Sample, outcome: Outcome) -> float:
    return outcome.same


def _probability(sample: Sample, outcome: Outcome) -> float:
    return math.exp(-outcome.nll)


AGREEMENT = Task(name="agreement", summary="same likeliest next token as full attention", make=stretches, score=_same)
PERPLEXITY = Task(name="perplexity", summary="probability of the text's own tokens", make=stretches, score=_probability)
