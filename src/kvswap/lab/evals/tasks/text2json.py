"""Many look-ups in one answer: collect facts into a JSON object.

The task follows Text2JSON (Bocharnikov et al., arXiv 2604.08426). The codes of sixteen names are hidden in
real text. One sample asks for a JSON object with the codes of eight names, the next sample of the same text for the
other eight. The score is the share of the eight codes that are correct.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace

from kvswap.lab.evals.samples import Outcome, Prompt, Sample, Source, Task, ask, fit, forced_answer
from kvswap.lab.evals.tasks.ruler import hidden, names, sentences

NAMES = 16
ASKED = 8
NEW_TOKENS = 160
FACT = "The code of {name} is {code}."
QUESTION = (
    "The text names the codes of {names}. Write a JSON object with these names as keys and their codes as values."
)


def samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield ``count`` samples; every two share a text with its names and codes."""
    for text in range(-(-count // 2)):
        for half, sample in enumerate(text_samples(source, context, text)):
            if 2 * text + half < count:
                yield replace(sample, index=2 * text + half, text=text)


def text_samples(source: Source, context: int, text: int) -> list[Sample]:
    """Return the two samples of text number ``text``."""
    dice = random.Random(f"text2json/{source.seed}/{text}")
    codes = {name: str(dice.randint(1000, 9999)) for name in names(dice, NAMES)}
    facts = [FACT.format(name=name, code=code) for name, code in codes.items()]
    depths, pieces, order = [dice.random() for _ in facts], sentences(source, dice), dice.sample(list(codes), NAMES)
    halves = [{name: codes[name] for name in part} for part in (order[:ASKED], order[ASKED:])]

    def build(n: int) -> list[Prompt]:
        whole = hidden(pieces[:n], facts, depths)
        return [
            ask(source, whole, QUESTION.format(names=", ".join(half)), f'{{"{next(iter(half))}":') for half in halves
        ]

    return [
        Sample(
            context=context,
            index=0,
            prompt=prompt,
            forced=forced_answer(source, json.dumps({name: int(code) for name, code in half.items()}).split(":", 1)[1]),
            answers=tuple(f"{name} {code}" for name, code in half.items()),
            max_new_tokens=NEW_TOKENS,
        )
        for prompt, half in zip(fit(context, build, len(pieces)), halves, strict=True)
    ]


def right_entries(sample: Sample, outcome: Outcome) -> float:
    """Return the share of correct entries. The answer need not be valid JSON to its end."""
    first = sample.answers[0].split()[0]
    found: dict[str, str] = dict(re.findall(r'"([\w-]+)":\s*"?(\w+)"?', f'"{first}":{outcome.text or ""}'))
    expected = dict(answer.split() for answer in sample.answers)
    correct = [name for name, code in expected.items() if found.get(name) == code]
    return len(correct) / len(expected)


TEXT2JSON = Task(
    name="text2json", summary="eight look-ups in one answer", make=samples, score=right_entries, settled=True
)
