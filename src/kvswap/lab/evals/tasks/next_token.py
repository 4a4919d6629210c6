"""Next-token tasks on plain text with teacher forcing: cheap, and sensitive to small differences.

``agreement`` scores the share of steps where the method and full attention have the same most likely token.
``perplexity`` scores 1 / perplexity: the geometric mean of the probability of the text's own tokens. Both use the same
samples, so each sample is computed once for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvswap.errors import InputError
from kvswap.lab.evals.samples import Outcome, Sample, Source, Task


def stretches(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield ``count`` samples of ``context`` tokens and the forced steps after them, evenly spread over the text.

    Raises InputError when the text is too short for one sample.
    """
    ids: list[int] = []
    enough = (context + source.steps) * count
    for _, text in source.passages:
        ids += source.tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    spare = len(ids) - context - source.steps
    if spare < 0:
        raise InputError(
            f"context {context:,}: the text has {len(ids):,} tokens, {context + source.steps:,} are needed",
            hint="add text with --document",
        )
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


AGREEMENT = Task(name="agreement", summary="same most likely next token as full attention", make=stretches, score=_same)
PERPLEXITY = Task(name="perplexity", summary="probability of the text's own tokens", make=stretches, score=_probability)
