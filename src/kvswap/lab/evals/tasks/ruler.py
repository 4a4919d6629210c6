"""Needles in a haystack and variable tracking, after RULER (Hsieh et al., arXiv 2404.06654) and in its wording.

A *needle* is a sentence that gives a key a value. A question asks for the value of a key.

* S1 hides one needle in repeated noise, S2 one in real text.
* MK1 hides four keys and asks for one; MQ asks for all four; MV hides one key with four values.
* VT hides a chain of variable assignments in noise.
* GRID (task ``needle``, Kamradt 2023) hides one needle in real text at five depths.

The score is the share of the answers that the generated text contains. Small models fail some of these tasks with full
attention too, so compare scores with those of full attention (retention). MK1 and MQ ask five questions about the same
text, so that most of its prompt is computed once.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from string import ascii_uppercase
from typing import Any

from kvswap.lab.evals.samples import (
    NOISE_TEXT,
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

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's haystack
NEEDLE = "One of the special magic numbers for {key} is: {value}."
MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{text}"
)
ONE = MANY.replace("Some special magic numbers are", "A special magic number is").replace("the numbers", "the number")
DEPTHS = 40
"""Number of possible depths of a needle, evenly spread from the beginning to the end of the text."""
GRID_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHAIN = 5
MOST_TOKEN_CHARACTERS = 8
"""Real text has fewer characters than this a token, in the mean."""
NEW_TOKENS, MANY_NEW_TOKENS = 64, 128  # as in RULER; small models write a sentence around each of several numbers
# fmt: off
FIRST = (
    "able", "ancient", "bold", "brave", "bright", "calm", "clever", "curious", "damp", "eager", "early", "fancy",
    "fierce", "gentle", "giant", "grand", "happy", "hollow", "humble", "icy", "jolly", "kind", "lively", "loud",
    "lucky", "mellow", "mighty", "modest", "narrow", "noble", "odd", "pale", "plain", "polite", "proud", "quick",
    "quiet", "rapid", "rough", "rusty", "shy", "silent", "sleepy", "smooth", "steady", "stormy", "sturdy", "tidy",
    "tiny", "vast", "warm", "wild", "wise", "witty", "young",
)
SECOND = (
    "anchor", "apple", "arrow", "badger", "banana", "barrel", "basket", "beacon", "bridge", "bucket", "button",
    "cabin", "candle", "canyon", "carrot", "castle", "cedar", "circle", "comet", "copper", "cotton", "desert",
    "dragon", "eagle", "engine", "falcon", "feather", "forest", "garden", "hammer", "harbor", "island", "jacket",
    "kettle", "ladder", "lantern", "lemon", "magnet", "maple", "meadow", "mirror", "needle", "orchard", "otter",
    "paddle", "pebble", "pencil", "pepper", "pillow", "planet", "rabbit", "ribbon", "river", "saddle", "shadow",
    "silver", "spider", "tunnel", "turtle", "valley", "violin", "walnut", "window", "winter",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Needles:
    """What is hidden in a text: ``keys`` keys with ``values`` values each. ``noise``: in noise, not in real text."""

    keys: int = 1
    values: int = 1
    noise: bool = False

    @property
    def questions(self) -> list[list[int]]:
        """Indices of the keys that each question asks for: each key alone, then all keys where there are several."""
        each = [[key] for key in range(self.keys)]
        return each if self.keys == 1 else [*each, list(range(self.keys))]


def names(dice: random.Random, count: int) -> list[str]:
    """Return ``count`` different invented names such as ``quiet-otter``."""
    pairs = dice.sample(range(len(FIRST) * len(SECOND)), count)
    return [f"{FIRST[pair % len(FIRST)]}-{SECOND[pair // len(FIRST)]}" for pair in pairs]


def sentences(source: Source, number: int, context: int) -> list[str]:
    """Return the sentences of text ``number``, enough for ``context`` tokens; the first may be the end of one."""
    found: list[str] = []
    missing = MOST_TOKEN_CHARACTERS * context
    for text in source.text_from(number):
        part = " ".join(text[:missing].split())
        found += [sentence for sentence in re.split(r"(?<=[.!?])\s+", part) if sentence]
        missing -= len(part)
        if missing <= 0:
            break
    return found


def hidden(pieces: list[str], needles: list[str], depths: list[float]) -> str:
    """Join ``pieces`` with each needle inserted between two of them at its depth, a share of all characters."""
    whole, ends = list(pieces), list(itertools.accumulate(map(len, pieces), initial=0))
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        whole.insert(bisect.bisect_left(ends, depth * ends[-1]), needle)
    return " ".join(whole)


def needle_samples(
    kind: Needles, asked: slice, name: str, source: Source, context: int, count: int
) -> Iterator[Sample]:
    """Yield ``count`` samples that ask the questions ``asked`` about texts with needles at random depths.

    ``name`` seeds the random choices; tasks with the same name share their texts.
    """
    questions = range(len(kind.questions))[asked]
    for text in range(-(-count // len(questions))):
        dice = random.Random(f"{name}/{source.seed}/{text}")
        steps = sorted(dice.sample(range(DEPTHS), kind.keys * kind.values))
        found = text_samples(kind, source, context, text, dice, [step / (DEPTHS - 1) for step in steps])
        for place, question in enumerate(questions):
            index = text * len(questions) + place
            if index < count:
                yield replace(found[question], index=index)


def text_samples(
    kind: Needles, source: Source, context: int, text: int, dice: random.Random, depths: list[float]
) -> list[Sample]:
    """Build text number ``text`` with needles at ``depths`` (0 to 1, ascending); return a sample for each question."""
    keys = names(dice, kind.keys)
    values = [[str(dice.randint(10**6, 10**7 - 1)) for _ in range(kind.values)] for _ in keys]
    lines = [NEEDLE.format(key=key, value=value) for key, own in zip(keys, values, strict=True) for value in own]
    pieces = [NOISE] * (context // 4) if kind.noise else sentences(source, text, context)
    frame = MANY if len(lines) > 1 else ONE
    answers = [[value for key in asked for value in values[key]] for asked in kind.questions]
    asking = [
        ask_for([keys[key] for key in asked], several=len(own) > 1)
        for asked, own in zip(kind.questions, answers, strict=True)
    ]

    def build(n: int) -> list[Prompt]:
        whole = frame.format(text=hidden(pieces[:n], lines, depths))
        return [ask(source, whole, question, prefix) for question, prefix in asking]

    prompts = fit(context, build, len(pieces), piece_tokens=mean_tokens(source, pieces))
    check_filled(context, prompts)
    return [
        Sample(
            context=context,
            index=0,
            text=text,
            prompt=prompt,
            forced=forced_answer(source, f" {listed(own)}"),
            answers=tuple(own),
            max_new_tokens=NEW_TOKENS if len(own) == 1 else MANY_NEW_TOKENS,
        )
        for prompt, own in zip(prompts, answers, strict=True)
    ]


def ask_for(keys: list[str], *, several: bool) -> tuple[str, str]:
    """Return a question and the beginning of its answer."""
    what = "are all the special magic numbers" if several else "is the special magic number"
    number, verb = ("numbers", "are") if several else ("number", "is")
    place = f"for {listed(keys)} mentioned in the provided text"
    return f"What {what} {place}?", f" The special magic {number} {place} {verb}"


def grid_samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield ``count`` samples with one needle. Sample i asks about text i // 5 with the needle at depth i % 5."""
    for index in range(count):
        text, place = divmod(index, len(GRID_DEPTHS))
        dice = random.Random(f"needle/{source.seed}/{text}")
        (sample,) = text_samples(Needles(), source, context, text, dice, [GRID_DEPTHS[place]])
        yield replace(sample, index=index, labels={"depth": GRID_DEPTHS[place]})


def variable_samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield samples of variable tracking: a chain of five variables, after one solved example as in RULER."""
    for index in range(count):
        dice = random.Random(f"vt/{source.seed}/{index}")
        example, solution = _Chain.roll(dice), _Chain.roll(dice)
        head = f"{example.text(6)}\n{example.question}{example.prefix} {' '.join(example.variables)}\n\n"

        def build(n: int, head: str = head, chain: _Chain = solution) -> list[Prompt]:
            return [ask(source, head + chain.text(n), chain.question, chain.prefix)]

        yield Sample(
            context=context,
            index=index,
            text=index,
            prompt=fit(context, build, context // 4)[0],
            forced=forced_answer(source, f" {' '.join(solution.variables)}"),
            answers=tuple(solution.variables),
            max_new_tokens=NEW_TOKENS,
        )


@dataclass(frozen=True, slots=True)
class _Chain:
    """Variables that all get one value, each from the one before, and the depths of their lines in the noise."""

    variables: list[str]
    value: str
    depths: list[float]

    @classmethod
    def roll(cls, dice: random.Random) -> _Chain:
        variables = ["".join(dice.choices(ascii_uppercase, k=5)) for _ in range(CHAIN)]
        return cls(variables, str(dice.randint(10_000, 99_999)), sorted(dice.random() for _ in variables))

    def text(self, pieces: int) -> str:
        lines = [f"VAR {self.variables[0]} = {self.value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(self.variables)]
        noise = hidden([NOISE] * pieces, lines, self.depths)
        return f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{noise}"

    @property
    def question(self) -> str:
        return f"Question: Find all variables that are assigned the value {self.value} in the text above."

    @property
    def prefix(self) -> str:
        return (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{CHAIN} variables are assigned the value {self.value}, they are:"
        )


def _task(name: str, summary: str, make: Callable[[Source, int, int], Iterator[Sample]], **values: Any) -> Task:
    return Task(name=name, summary=summary, make=make, score=contains_all, settled=True, **values)


ONE_EACH, LAST = slice(0, -1), slice(-1, None)
KEYS = Needles(keys=4)
IN_NOISE = partial(needle_samples, Needles(noise=True), LAST, "s1")
S1 = _task("ruler-s1", "one needle in noise", IN_NOISE, text_kind=NOISE_TEXT)
S2 = _task("ruler-s2", "one needle in text", partial(needle_samples, Needles(), LAST, "s2"))
MK1 = _task("ruler-mk1", "four keys, one asked for", partial(needle_samples, KEYS, ONE_EACH, "keys"), questions=4)
MQ = _task("ruler-mq", "four keys, all asked for", partial(needle_samples, KEYS, LAST, "keys"))
MV = _task("ruler-mv", "one key with four values", partial(needle_samples, Needles(values=4), LAST, "mv"))
VT = _task("ruler-vt", "a chain of variables in noise", variable_samples, text_kind=NOISE_TEXT)
GRID = _task("needle", "a needle at five depths", grid_samples, questions=len(GRID_DEPTHS))
