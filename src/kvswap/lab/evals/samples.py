"""What a task is made of: samples with a prompt and what is judged after it, and how an outcome is scored.

A prompt is computed exactly by every method (prefill is exact), so what is judged are the decode steps after it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvswap.app.prompt import Request, encode, render
from kvswap.errors import InputError

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt.

    Parameters
    ----------
    prompt
        Token ids, at most ``context`` of them.
    forced
        Token ids that follow the prompt and are fed one by one (teacher-forced): the text itself, or the right answer.
    answers
        What a generated answer must contain; empty where nothing is generated.
    max_new_tokens
        Longest generated answer.
    text
        Number of the text it asks about. Samples may share one, so that most of their prompts is computed once.
    labels
        Where in a task's grid this is, such as ``{"depth": 0.5}``.
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
        """SHA-256 of the token ids of prompt and forced tokens, its first 16 hexadecimal digits."""
        digest = hashlib.sha256(struct.pack(f"<q{len(self.prompt)}q", len(self.prompt), *self.prompt))
        digest.update(struct.pack(f"<{len(self.forced)}q", *self.forced))
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What samples are made from. ``passages``: names and texts to evaluate on; ``steps``: forced steps on text."""

    tokenizer: Any
    passages: Sequence[tuple[str, str]]
    seed: int
    steps: int
    datasets: Sequence[Path] = ()

    def count_tokens(self, text: str) -> int:
        """Tokens of a piece of text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one method made of one sample: ``nll`` and ``same`` of the forced tokens, and the generated ``text``."""

    nll: float
    same: float
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A kind of sample. ``make(source, context, count)`` gives samples; ``score`` is better when higher, 0 to 1.

    ``settled``: whether words after an answer of score 1 change nothing, so that it need not go on.
    """

    name: str
    summary: str
    make: Callable[[Source, int, int], Iterable[Sample]]
    score: Callable[[Sample, Outcome], float]
    settled: bool = False


def ask(source: Source, context_text: str, question: str, prefix: str) -> Prompt:
    """Token ids of a question about a text, up to the first words of its answer, ``prefix``."""
    text = render(source.tokenizer, [], Request(context_text, question)) + prefix
    return tuple(encode(source.tokenizer, text, first=True))


def fit(
    context: int, build: Callable[[int], list[Prompt]], most: int, least: int = 0, piece_tokens: int = 16
) -> list[Prompt]:
    """The prompts that ``build(n)`` makes from the most pieces of text, ``least <= n <= most``, that fit ``context``.

    They are questions about one text, so they begin alike; the longest of them decides. ``piece_tokens`` is a first
    guess. Raises InputError where not even the least text fits.
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
        # the next guess by the tokens a piece takes: two or three rounds instead of a bisection
        by_rate = int(guess * context / max(1, _longest(prompts)))
        guess = min(high, max(low + 1, by_rate)) if low < high else low
    return best


def _longest(prompts: list[Prompt]) -> int:
    return max(map(len, prompts))


def forced_answer(source: Source, text: str) -> tuple[int, ...]:
    """Token ids of an answer that follows a prompt."""
    ids: list[int] = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tuple(ids)


def listed(values: Sequence[str]) -> str:
    """``1, 2, and 3``."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])}, and {values[-1]}"


def contains_all(sample: Sample, outcome: Outcome) -> float:
    """Share of the answers that the generated text contains, letter case aside (RULER's ``string_match_all``)."""
    text = (outcome.text or "").lower()
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


def contains_any(sample: Sample, outcome: Outcome) -> float:
    """1 where the generated text contains one of the answers (RULER's ``string_match_part``)."""
    text = (outcome.text or "").lower()
    return float(any(answer.lower() in text for answer in sample.answers))
