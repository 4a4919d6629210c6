"""Many look-ups in one answer, after the Text2JSON of Bocharnikov et al. (arXiv 2604.08426): facts into a JSON object.

Codes of sixteen names lie about in real text; a JSON object with the codes of eight of them is asked for. The score is
the share of the eight that the answer has right.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

from kvswap.evals.samples import Outcome, Sample, Source, Task, ask, fit, forced_answer
from kvswap.evals.tasks.ruler import hidden, names, sentences

NAMES = 16
ASKED = 8
NEW_TOKENS = 160
FACT = "The code of {name} is {code}."


def samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """A different text, other names and codes in each."""
    for index in range(count):
        dice = random.Random(f"text2json/{source.seed}/{index}")
        codes = {name: str(dice.randint(1000, 9999)) for name in names(dice, NAMES)}
        facts = [FACT.format(name=name, code=code) for name, code in codes.items()]
        depths = [dice.random() for _ in facts]
        asked = {name: codes[name] for name in dice.sample(list(codes), ASKED)}
        pieces = sentences(source, dice)
        question = (
            f"The text names the codes of {', '.join(asked)}. "
            "Write a JSON object with these names as keys and their codes as values."
        )

        def build(
            n: int,
            pieces: list[str] = pieces,
            facts: list[str] = facts,
            depths: list[float] = depths,
            question: str = question,
            first: str = next(iter(asked)),
        ) -> tuple[int, ...]:
            return ask(source, hidden(pieces[:n], facts, depths), question, f'{{"{first}":')

        yield Sample(
            context=context,
            index=index,
            prompt=fit(source, context, build, len(pieces)),
            forced=forced_answer(source, json.dumps(asked).split(":", 1)[1]),
            answers=tuple(f"{name} {code}" for name, code in asked.items()),
            max_new_tokens=NEW_TOKENS,
        )


def right_entries(sample: Sample, outcome: Outcome) -> float:
    """Share of the entries asked for that the answer has, whether or not it is valid JSON to its end."""
    first = sample.answers[0].split()[0]
    found: dict[str, str] = dict(re.findall(r'"([\w-]+)":\s*"?(\w+)"?', f'"{first}":{outcome.text or ""}'))
    wanted = dict(answer.split() for answer in sample.answers)
    right = [name for name, code in wanted.items() if found.get(name) == code]
    return len(right) / len(wanted)


TEXT2JSON = Task(name="text2json", summary="eight look-ups in one answer", make=samples, score=right_entries)
