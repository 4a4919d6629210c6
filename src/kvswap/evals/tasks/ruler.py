"""Synthetic long-context tasks after RULER (Hsieh et al., arXiv 2404.06654), in its wording: needles and variables.

S1: one needle in repeated noise. S2: one in real text. MK1: four keys, one asked for. MV: one key with four values.
MQ: four keys, all asked for. VT: a chain of variable assignments in noise. The score is the share of the answers that
the generated text contains; small models fail some of them with full attention too, so look at retention.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from string import ascii_uppercase

from kvswap.evals.samples import Sample, Source, Task, ask, contains_all, fit, forced_answer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's haystack
NEEDLE = "One of the special magic numbers for {key} is: {value}."
MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{text}"
)
ONE = MANY.replace("Some special magic numbers are", "A special magic number is").replace("the numbers", "the number")
DEPTHS = 40
CHAIN = 5
NEW_TOKENS = 64
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
    """What is hidden and asked for: ``keys`` with ``values`` each, of which ``asked`` keys are asked for."""

    keys: int = 1
    values: int = 1
    asked: int = 1
    noise: bool = False


def names(dice: random.Random, count: int) -> list[str]:
    """Different made-up names such as ``quiet-otter``."""
    pairs = dice.sample(range(len(FIRST) * len(SECOND)), count)
    return [f"{FIRST[pair % len(FIRST)]}-{SECOND[pair // len(FIRST)]}" for pair in pairs]


def sentences(source: Source, dice: random.Random) -> list[str]:
    """The text to hide things in, from a passage chosen by ``dice`` on, without end."""
    start = dice.randrange(len(source.passages))
    order = [*source.passages[start:], *source.passages[:start]]
    found: list[str] = []
    for _, text in order:
        found += [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]
        if len(found) > 20_000:
            break
    return found


def hidden(pieces: list[str], needles: list[str], depths: list[float]) -> str:
    """``pieces`` joined, each needle put in between two of them at its depth, a share of all characters."""
    whole, ends = list(pieces), list(itertools.accumulate(map(len, pieces), initial=0))
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        whole.insert(bisect.bisect_left(ends, depth * ends[-1]), needle)
    return " ".join(whole)


def needle_samples(kind: Needles, name: str, source: Source, context: int, count: int) -> Iterator[Sample]:
    """Samples with needles at random depths, a different text each."""
    for index in range(count):
        dice = random.Random(f"{name}/{source.seed}/{index}")
        depths = [step / (DEPTHS - 1) for step in dice.sample(range(DEPTHS), kind.keys * kind.values)]
        yield needle_sample(kind, source, context, index, dice, depths)


def needle_sample(
    kind: Needles, source: Source, context: int, index: int, dice: random.Random, depths: list[float]
) -> Sample:
    """One sample whose needles lie at ``depths``, 0 to 1."""
    keys = names(dice, kind.keys)
    values = [[str(dice.randint(10**6, 10**7 - 1)) for _ in range(kind.values)] for _ in keys]
    lines = [NEEDLE.format(key=key, value=value) for key, own in zip(keys, values, strict=True) for value in own]
    pieces = [NOISE] * (context // 4) if kind.noise else sentences(source, dice)
    chosen = sorted(dice.sample(range(kind.keys), kind.asked))
    answers = [value for number in chosen for value in values[number]]
    asked = [keys[number] for number in chosen]
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    several = len(answers) > 1
    what = "are all the special magic numbers" if several else "is the special magic number"
    plural = "numbers" if several else "number"
    question = f"What {what} for {query} mentioned in the provided text?"
    prefix = f" The special magic {plural} for {query} mentioned in the provided text {'are' if several else 'is'}"
    frame = MANY if several else ONE

    def build(n: int) -> tuple[int, ...]:
        return ask(source, frame.format(text=hidden(pieces[:n], lines, depths)), question, prefix)

    prompt = fit(source, context, build, len(pieces))
    listed = answers[0] if not several else f"{', '.join(answers[:-1])}, and {answers[-1]}"
    return Sample(
        context=context,
        index=index,
        prompt=prompt,
        forced=forced_answer(source, f" {listed}"),
        answers=tuple(answers),
        max_new_tokens=NEW_TOKENS,
    )


def variable_samples(source: Source, context: int, count: int) -> Iterator[Sample]:
    """Variable tracking: a chain of five variables, with one solved example before it as in RULER."""
    for index in range(count):
        dice = random.Random(f"vt/{source.seed}/{index}")
        example, solution = _Chain.roll(dice), _Chain.roll(dice)
        head = f"{example.text(6)}\n{example.question}{example.prefix} {' '.join(example.variables)}\n\n"

        def build(n: int, head: str = head, chain: _Chain = solution) -> tuple[int, ...]:
            return ask(source, head + chain.text(n), chain.question, chain.prefix)

        yield Sample(
            context=context,
            index=index,
            prompt=fit(source, context, build, context // 4),
            forced=forced_answer(source, f" {' '.join(solution.variables)}"),
            answers=tuple(solution.variables),
            max_new_tokens=NEW_TOKENS,
        )


@dataclass(frozen=True, slots=True)
class _Chain:
    """Variables that all get one value, each from the one before, and where in the noise their lines stand."""

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


def _task(name: str, summary: str, kind: Needles) -> Task:
    return Task(name=name, summary=summary, make=partial(needle_samples, kind, name), score=contains_all)


S1 = _task("ruler-s1", "one needle in noise", Needles(noise=True))
S2 = _task("ruler-s2", "one needle in text", Needles())
MK1 = _task("ruler-mk1", "four keys, one asked for", Needles(keys=4))
MQ = _task("ruler-mq", "four keys, all asked for", Needles(keys=4, asked=4))
MV = _task("ruler-mv", "one key with four values", Needles(values=4))
VT = Task(name="ruler-vt", summary="a chain of variables in noise", make=variable_samples, score=contains_all)
