"""The parts of an evaluation task: samples, their source, outcomes and scores; and helpers to build prompts.

Prefill is exact, so every method computes a prompt exactly. What a task scores are the decode steps after it. Tasks in
``evals.tasks`` use this module. Any thread may call; nothing here changes state.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvswap.app.prompt import Message, encode, render
from kvswap.errors import InputError

Prompt = tuple[int, ...]
PYTHON_TEXT, DOCUMENTS, NOISE_TEXT, DATASETS = "Python documentation", "documents", "noise", "datasets"
"""Kinds of text that samples are made of."""
GOLDEN_RATIO = 0.618033988749895
COUNTED_CHARACTERS, COUNTED_PIECES = 100_000, 100
FILLED_SHARE = 0.8
"""A prompt that is shorter than this share of its context is refused, where it is made of running text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt, with the tokens and answers that follow it.

    Parameters
    ----------
    prompt
        Token ids, at most ``context`` of them.
    forced
        Token ids after the prompt that are fed one by one (teacher forcing): the text's own, or the correct answer.
    answers
        Strings that a generated answer must contain; empty where no answer is generated.
    max_new_tokens
        Length limit of a generated answer in tokens.
    text
        Number of the text that it asks about. Samples may share a text; most of their prompts is then computed once.
    labels
        Further keys of its record, such as ``{"depth": 0.5}``.
    """

    context: int
    index: int
    prompt: Prompt
    forced: tuple[int, ...]
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    text: int = 0
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the prompt's and the forced token ids."""
        digest = hashlib.sha256(struct.pack(f"<q{len(self.prompt)}q", len(self.prompt), *self.prompt))
        digest.update(struct.pack(f"<{len(self.forced)}q", *self.forced))
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What samples are built from.

    ``passages`` are names and texts to evaluate on, and ``kind`` says what kind of text they are. ``steps`` is the
    number of forced steps of plain-text tasks. ``datasets`` are files for tasks that need some. ``made`` keeps what
    tasks made of a text, for the other tasks that ask about it.
    """

    tokenizer: Any
    passages: Sequence[tuple[str, str]]
    seed: int
    steps: int
    kind: str = PYTHON_TEXT
    datasets: Sequence[Path] = ()
    made: dict[Any, list[Sample]] = field(default_factory=dict, compare=False)

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text_from(self, number: int) -> Iterator[str]:
        """Yield the passages of text ``number``: everything from its beginning on, and round to that again.

        Beginnings are spread evenly over all passages, whatever the number of texts (multiples of the golden ratio).
        """
        share = (random.Random(f"beginnings/{self.seed}").random() + number * GOLDEN_RATIO) % 1
        skipped = int(share * sum(len(text) for _, text in self.passages))
        for place, (_, text) in enumerate(self.passages):
            if skipped < len(text):
                yield text[skipped:]
                yield from (text for _, text in self.passages[place + 1 :])
                yield from (text for _, text in self.passages[:place])
                yield text[:skipped]
                return
            skipped -= len(text)

    def about_tokens(self) -> int:
        """Estimate the tokens of all passages from those of a part of them."""
        characters = sum(len(text) for _, text in self.passages)
        part = "".join(itertools.islice(itertools.chain.from_iterable(self.text_from(0)), COUNTED_CHARACTERS))
        return round(characters * self.count_tokens(part) / max(1, len(part)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one variant did on one sample.

    ``nll`` is the mean over forced tokens in nats. ``same`` is the share of steps whose most likely token is that of
    full attention. ``text`` is the generated answer, None where there is none.
    """

    nll: float
    same: float
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A kind of sample and its score.

    ``make(source, context, count)`` yields samples. ``score`` is from 0 to 1; higher is better. ``settled``: whether
    an answer keeps a score of 1 whatever follows, so that generation may stop there. ``questions`` is the number of
    samples about each text. ``text_kind`` is the kind of text where that is not the source's, such as noise.
    """

    name: str
    summary: str
    make: Callable[[Source, int, int], Iterable[Sample]]
    score: Callable[[Sample, Outcome], float]
    settled: bool = False
    questions: int = 1
    text_kind: str | None = None


def ask(source: Source, context_text: str, question: str, prefix: str) -> Prompt:
    """Return the token ids of a question about a text; ``prefix`` is the beginning of the answer."""
    text = render(source.tokenizer, [Message("user", question, context_text)]) + prefix
    return tuple(encode(source.tokenizer, text, first=True))


def fit(
    context: int, build: Callable[[int], list[Prompt]], most: int, least: int = 0, piece_tokens: int = 16
) -> list[Prompt]:
    """Return ``build(n)`` for the largest n from ``least`` to ``most`` whose prompts all fit ``context`` tokens.

    ``build(n)`` builds prompts with several questions about one text of n pieces. ``piece_tokens`` is a first guess of
    the tokens per piece. Raises InputError when ``build(least)`` does not fit.
    """
    low, high = least, most
    best = build(least)
    if _longest(best) > context:
        alone = f"the question with {least} pieces of text" if least else "the question alone"
        raise InputError(f"context {context:,}: {alone} has {_longest(best):,} tokens", hint="use a longer context")
    guess = min(most, least + context // piece_tokens + 1)
    while low < high:
        prompts = build(guess)
        if _longest(prompts) <= context:
            low, best = guess, prompts
        else:
            high = guess - 1
        # The next guess follows from the tokens per piece. This takes two or three rounds, fewer than a bisection.
        by_rate = int(guess * context / max(1, _longest(prompts)))
        guess = min(high, max(low + 1, by_rate)) if low < high else low
    return best


def mean_tokens(source: Source, pieces: Sequence[str]) -> int:
    """Estimate the tokens of a piece of text from the first ones."""
    counted = pieces[:COUNTED_PIECES]
    return max(1, source.count_tokens(" ".join(counted)) // max(1, len(counted)))


def check_filled(context: int, prompts: list[Prompt]) -> None:
    """Raise InputError where prompts are much shorter than the context, because there was no more text."""
    if _longest(prompts) < FILLED_SHARE * context:
        raise InputError(
            f"context {context:,}: the text is too short, all of it makes a prompt of {_longest(prompts):,} tokens",
            hint="add text with --document, or use a shorter context",
        )


def _longest(prompts: list[Prompt]) -> int:
    return max(map(len, prompts))


def forced_answer(source: Source, text: str) -> tuple[int, ...]:
    """Return the token ids of an answer that follows a prompt."""
    ids: list[int] = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tuple(ids)


def listed(values: Sequence[str]) -> str:
    """Join values as in ``1, 2, and 3``."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])}, and {values[-1]}"


def contains_all(sample: Sample, outcome: Outcome) -> float:
    """Return the share of the answers that the text contains, ignoring case (RULER's ``string_match_all``)."""
    text = (outcome.text or "").lower()
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


def contains_any(sample: Sample, outcome: Outcome) -> float:
    """Return 1 if the text contains one of the answers, ignoring case (RULER's ``string_match_part``)."""
    text = (outcome.text or "").lower()
    return float(any(answer.lower() in text for answer in sample.answers))
