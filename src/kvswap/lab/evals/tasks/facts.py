"""Several facts in one text, and nine questions about it, so that a long prompt is computed once for all of them.

The text hides five keys with one number each, at the five depths of the needle grid; one key with four numbers; and the
names and codes of ``text2json``. Each kind of question is a task:

* ``facts-one`` asks for the number of each of the five keys, as RULER's MK1 (Hsieh et al., arXiv 2404.06654) and, by
  depth, as a needle grid among look-alikes.
* ``facts-all`` asks for the numbers of all five, as RULER's MQ.
* ``facts-values`` asks for the four numbers of the sixth key, as RULER's MV.
* ``facts-json`` asks for codes as ``text2json`` does.

RULER hides less in a text, so these are harder than its tasks. Scores are the share of the answers in the text that was
generated, and the share of correct fields for ``facts-json``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from kvswap.lab.evals.samples import (
    Prompt,
    Sample,
    Source,
    Task,
    ask,
    check_filled,
    contains_all,
    fit,
    forced_answer,
    listed,
    mean_tokens,
)
from kvswap.lab.evals.tasks.ruler import (
    GRID_DEPTHS,
    MANY_NEW_TOKENS,
    NEEDLE,
    NEW_TOKENS,
    ask_for,
    hidden,
    names,
    sentences,
)
from kvswap.lab.evals.tasks.text2json import count_names, half_sample, question, right_fields, roll_codes, split, state

FRAME = (
    "Some special magic numbers and some codes are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about them afterwards.\n{text}"
)
VALUES = 4
ONE, ALL, OF_ONE_KEY, JSON = slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 9)
"""Places of each kind of question among the nine."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is hidden in a text: a number for each key, several for ``key``, and codes in two halves."""

    numbers: dict[str, str]
    key: str
    values: list[str]
    halves: list[dict[str, str]]

    @classmethod
    def roll(cls, dice: random.Random, count: int) -> _Facts:
        """Invent facts, with ``count`` codes."""
        given = names(dice, len(GRID_DEPTHS) + 1 + count)
        keys, key, named = given[: len(GRID_DEPTHS)], given[len(GRID_DEPTHS)], given[len(GRID_DEPTHS) + 1 :]
        numbers = [str(dice.randint(10**6, 10**7 - 1)) for _ in range(len(keys) + VALUES)]
        halves = split(dice, roll_codes(dice, named))
        return cls(dict(zip(keys, numbers, strict=False)), key, numbers[len(keys) :], halves)

    @property
    def needles(self) -> list[str]:
        """A sentence for each fact: those of the keys first."""
        pairs = [*self.numbers.items(), *((self.key, value) for value in self.values)]
        return [NEEDLE.format(key=key, value=value) for key, value in pairs] + [
            sentence for half in self.halves for sentence in state(half)
        ]

    @property
    def asked(self) -> list[tuple[list[str], list[str]]]:
        """Keys and their numbers, of each question for numbers."""
        each = [([key], [number]) for key, number in self.numbers.items()]
        return [*each, (list(self.numbers), list(self.numbers.values())), ([self.key], self.values)]


def text_samples(source: Source, context: int, text: int) -> list[Sample]:
    """Return the nine samples of text number ``text``, in the order of the kinds of questions."""
    dice = random.Random(f"facts/{source.seed}/{text}")
    facts = _Facts.roll(dice, count_names(context))
    needles, pieces = facts.needles, sentences(source, text, context)
    depths = [*GRID_DEPTHS, *(dice.random() for _ in needles[len(GRID_DEPTHS) :])]
    asking = [ask_for(keys, several=len(numbers) > 1) for keys, numbers in facts.asked]
    asking += [question(half) for half in facts.halves]

    def build(n: int) -> list[Prompt]:
        whole = FRAME.format(text=hidden(pieces[:n], needles, depths))
        return [ask(source, whole, *each) for each in asking]

    prompts = fit(context, build, len(pieces), piece_tokens=mean_tokens(source, pieces))
    check_filled(context, prompts)
    found = [
        Sample(
            context=context,
            index=0,
            text=text,
            prompt=prompt,
            forced=forced_answer(source, f" {listed(numbers)}"),
            answers=tuple(numbers),
            max_new_tokens=NEW_TOKENS if len(numbers) == 1 else MANY_NEW_TOKENS,
        )
        for prompt, (_, numbers) in zip(prompts, facts.asked, strict=False)
    ]
    found[ONE] = [replace(each, labels={"depth": depth}) for each, depth in zip(found[ONE], GRID_DEPTHS, strict=True)]
    codes = zip(prompts[JSON], facts.halves, strict=True)
    return found + [half_sample(source, context, text, *each) for each in codes]


def samples(kind: slice, source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield ``count`` samples of one kind; all kinds ask about the same texts, each of which is built once."""
    questions = kind.stop - kind.start
    for text in range(-(-count // questions)):
        place = ("facts", context, text)
        if place not in source.made:
            source.made[place] = text_samples(source, context, text)
        for number, sample in enumerate(source.made[place][kind]):
            if text * questions + number < count:
                yield replace(sample, index=text * questions + number)


FACTS_ONE = Task(
    name="facts-one",
    summary="several facts, one asked for, by depth",
    make=partial(samples, ONE),
    score=contains_all,
    settled=True,
    questions=len(GRID_DEPTHS),
)
FACTS_ALL = Task(
    name="facts-all",
    summary="several facts, five asked for",
    make=partial(samples, ALL),
    score=contains_all,
    settled=True,
)
FACTS_VALUES = Task(
    name="facts-values",
    summary="several facts, four of one key asked for",
    make=partial(samples, OF_ONE_KEY),
    score=contains_all,
    settled=True,
)
FACTS_JSON = Task(
    name="facts-json",
    summary="several facts, many codes asked for",
    make=partial(samples, JSON),
    score=right_fields,
    settled=True,
    questions=JSON.stop - JSON.start,
)
