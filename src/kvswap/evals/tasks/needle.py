"""A needle in real text, over a grid of depths and lengths (Kamradt 2023). Samples are dealt out over the depths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from kvswap.evals.samples import Sample, Source, Task, contains_all
from kvswap.evals.tasks.ruler import Needles, needle_sample

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def grid(source: Source, context: int, count: int) -> Iterator[Sample]:
    """``count`` samples; sample i has its needle at the (i mod 5)-th depth and is labelled with it."""
    for index in range(count):
        dice = random.Random(f"needle/{source.seed}/{index}")
        depth = DEPTHS[index % len(DEPTHS)]
        yield replace(needle_sample(Needles(), source, context, index, dice, [depth]), labels={"depth": depth})


NEEDLE = Task(name="needle", summary="a needle at five depths", make=grid, score=contains_all)
