"""Many look-ups in one answer: collect facts that lie about in a long text into a JSON object.

The task follows Text2JSON (Bocharnikov et al., arXiv 2604.08426), and LongProc (Ye et al., arXiv 2501.05414) in that
what has to be collected, and so the answer, grows with the text. Sixteen names for every 8,192 tokens have a code each,
hidden in real text. One sample asks for a JSON object with the codes of half of the names, the next sample of the same
text for the other half. The score is by field: the share of the codes asked for that are correct.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from kvswap.lab.evals.samples import (
    Outcome,
    Prompt,
    Sample,
    Source,
    Task,
    ask,
    check_filled,
    fit,
    forced_answer,
    mean_tokens,
)
from kvswap.lab.evals.tasks.ruler import hidden, names, sentences

NAMES, NAMES_TOKENS = 16, 8192
"""So many names in so many tokens of context; at least as many in a shorter one."""
HALVES = 2
FIELD_NEW_TOKENS = 20
FACT = "The code of {name} is {code}."
QUESTION = (
    "The text names the codes of {names}. Write a JSON object with these names as keys and their codes as values."
)


def count_names(context: int) -> int:
    """Count the names with codes in a text of ``context`` tokens."""
    return NAMES * max(1, round(context / NAMES_TOKENS))


def samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield ``count`` samples; every two share a text with its names and codes."""
    for text in range(-(-count // HALVES)):
        for half, sample in enumerate(text_samples(source, context, text)):
            if HALVES * text + half < count:
                yield replace(sample, index=HALVES * text + half)


def text_samples(source: Source, context: int, text: int) -> list[Sample]:
    """Return the two samples of text number ``text``."""
    dice = random.Random(f"text2json/{source.seed}/{text}")
    codes = roll_codes(dice, names(dice, count_names(context)))
    facts, halves = state(codes), split(dice, codes)
    depths, pieces = [dice.random() for _ in facts], sentences(source, text, context)

    def build(n: int) -> list[Prompt]:
        whole = hidden(pieces[:n], facts, depths)
        return [ask(source, whole, *question(half)) for half in halves]

    prompts = fit(context, build, len(pieces), piece_tokens=mean_tokens(source, pieces))
    check_filled(context, prompts)
    return [half_sample(source, context, text, *each) for each in zip(prompts, halves, strict=True)]


def roll_codes(dice: random.Random, given: Sequence[str]) -> dict[str, str]:
    """Give every name a code of four digits."""
    return {name: str(dice.randint(1000, 9999)) for name in given}


def state(codes: Mapping[str, str]) -> list[str]:
    """Return a sentence for every code."""
    return [FACT.format(name=name, code=code) for name, code in codes.items()]


def split(dice: random.Random, codes: Mapping[str, str]) -> list[dict[str, str]]:
    """Divide codes into halves, in random order."""
    order, middle = dice.sample(list(codes), len(codes)), len(codes) // HALVES
    return [{name: codes[name] for name in part} for part in (order[:middle], order[middle:])]


def question(half: Mapping[str, str]) -> tuple[str, str]:
    """Return the question for some names, and the beginning of its answer."""
    return QUESTION.format(names=", ".join(half)), f'{{"{next(iter(half))}":'


def half_sample(source: Source, context: int, text: int, prompt: Prompt, half: Mapping[str, str]) -> Sample:
    """Return the sample that asks for the codes ``half``. Its answer may be a quarter longer than the right one."""
    right = json.dumps({name: int(code) for name, code in half.items()}).split(":", 1)[1]
    forced = forced_answer(source, right)
    return Sample(
        context=context,
        index=0,
        text=text,
        prompt=prompt,
        forced=forced,
        answers=tuple(f"{name} {code}" for name, code in half.items()),
        max_new_tokens=max(FIELD_NEW_TOKENS * len(half), len(forced) * 5 // 4),
    )


def right_fields(sample: Sample, outcome: Outcome) -> float:
    """Return the share of correct fields. The answer need not be valid JSON to its end."""
    first = sample.answers[0].split()[0]
    found: dict[str, str] = dict(re.findall(r'"([\w-]+)":\s*"?(\w+)"?', f'"{first}":{outcome.text or ""}'))
    expected = dict(answer.split() for answer in sample.answers)
    correct = [name for name, code in expected.items() if found.get(name) == code]
    return len(correct) / len(expected)


TEXT2JSON = Task(
    name="text2json",
    summary="many look-ups in one answer, by field",
    make=samples,
    score=right_fields,
    settled=True,
    questions=HALVES,
)
