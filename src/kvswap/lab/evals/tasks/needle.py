"""A needle in real text, over a grid of depths and lengths (Kamradt 2023). Samples are dealt out over the depths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from kvswap.lab.evals.samples import Sample, Source, Task, contains_all
from kvswap.lab.evals.tasks.ruler import Needles, text_samples

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def grid(source: Source, context: int, count: int) -> Iterator[Sample]:
    """``count`` samples; sample i has its needle at the (i mod 5)-th depth of text i / 5 and is labelled with it."""
    for index in range(count):
        text, place = divmod(index, len(DEPTHS))
        dice = random.Random(f"needle/{source.seed}/{text}")
        (sample,) = text_samples(Needles(), source, context, dice, [DEPTHS[place]])
        yield replace(sample, index=index, text=text, labels={"depth": DEPTHS[place]})


NEEDLE = Task(name="needle", summary="a needle at five depths", make=grid, score=contains_all, settled=True)
