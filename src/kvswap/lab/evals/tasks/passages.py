"""Questions about documents, in the place of RULER's QA1 and QA2. They are built from the text, without a data set.

The evaluation text is cut into documents with titles. QA1 shows a sentence with a word left out and asks for the word.
QA2 shows a sentence and asks for the title of its document; this needs two look-ups, the sentence and the title above
it. Four questions of each kind share the same documents.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from kvswap.errors import InputError
from kvswap.lab.evals.samples import (
    Prompt,
    Sample,
    Source,
    Task,
    ask,
    check_filled,
    contains_any,
    fit,
    forced_answer,
)

PIECE_CHARACTERS = 900
NEW_TOKENS = 24
SENTENCE_WORDS = range(9, 30)
QUESTIONS = 4
"""Questions of each kind about the same documents."""
LEAST_PIECES, PIECE_TOKENS = 4, 250


@dataclass(frozen=True, slots=True)
class _Piece:
    """One document of a prompt."""

    title: str
    text: str
    sentences: list[str]


def _pieces(source: Source, dice: random.Random) -> list[_Piece]:
    """Cut the text into documents of a few hundred tokens each, in random order."""
    found = []
    for name, text in source.passages:
        body = " ".join(text.split())
        for number, start in enumerate(range(0, len(body) - PIECE_CHARACTERS, PIECE_CHARACTERS)):
            piece = body[start : start + PIECE_CHARACTERS]
            parts = re.split(r"(?<=[.!?])\s+", piece)[1:-1]  # whole sentences only
            if len(parts) > 1:
                found.append(_Piece(f"{name}, part {number + 1}", " ".join(parts), parts))
    dice.shuffle(found)
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question about documents. ``prefix`` is the beginning of the answer; ``answer`` completes it."""

    question: str
    prefix: str
    answer: str


def _asked(pieces: list[_Piece], dice: random.Random) -> list[_Asked]:
    """Build QUESTIONS questions of each kind, QA1 first, about documents that are spread over ``pieces``.

    Raises InputError when the text has no usable sentence.
    """
    found: list[_Asked] = []
    for ask_about in (_missing_word, _document_title):
        for number in range(QUESTIONS):
            start = int((number + dice.random()) / QUESTIONS * len(pieces))
            order = [*range(start, len(pieces)), *range(start)]
            able = (each for place in order if (each := ask_about(pieces, place, dice)) is not None)
            first = next(able, None)
            if first is None:
                raise InputError("the text has no sentences to ask about", hint="add more text with --document")
            found.append(next((each for each in itertools.chain([first], able) if each not in found), first))
    return found


def _samples(kind: int, source: Source, context: int, count: int) -> Iterator[Sample]:
    """Yield ``count`` samples of one kind: 0 is QA1, 1 is QA2. Both kinds ask about the same documents."""
    for text in range(-(-count // QUESTIONS)):
        pieces = _pieces(source, random.Random(f"documents/{source.seed}/{text}"))
        asked: dict[Prompt, _Asked] = {}

        def build(
            n: int, text: int = text, pieces: list[_Piece] = pieces, asked: dict[Prompt, _Asked] = asked
        ) -> list[Prompt]:
            whole = "\n\n".join(f"Document: {piece.title}\n{piece.text}" for piece in pieces[:n])
            questions = _asked(pieces[:n], random.Random(f"questions/{source.seed}/{text}"))
            prompts = [ask(source, whole, each.question, each.prefix) for each in questions]
            asked.update(zip(prompts, questions, strict=True))
            return prompts

        prompts = fit(context, build, len(pieces), LEAST_PIECES, PIECE_TOKENS)
        check_filled(context, prompts)
        for question, prompt in enumerate(prompts):
            number, index = question - kind * QUESTIONS, text * QUESTIONS + question - kind * QUESTIONS
            if 0 <= number < QUESTIONS and index < count:
                yield _sample(source, context, index, text, prompt, asked[prompt])


def _sample(source: Source, context: int, index: int, text: int, prompt: Prompt, asked: _Asked) -> Sample:
    return Sample(
        context=context,
        index=index,
        text=text,
        prompt=prompt,
        forced=forced_answer(source, f" {asked.answer}"),
        answers=(asked.answer,),
        max_new_tokens=NEW_TOKENS,
    )


def _missing_word(pieces: list[_Piece], place: int, dice: random.Random) -> _Asked | None:
    """A QA1 question about document ``place``, or None where no sentence is usable."""
    for sentence in pieces[place].sentences:
        words = sentence.split()
        long = [n for n, word in enumerate(words) if 3 < n < len(words) - 1 and re.fullmatch(r"[a-z]{7,}", word)]
        if len(words) in SENTENCE_WORDS and long:
            gap = dice.choice(long)
            shown = " ".join([*words[:gap], "____", *words[gap + 1 :]])
            question = f'Which word stands at the gap in this sentence of the documents?\n"{shown}"'
            return _Asked(question, f' The sentence is: "{" ".join(words[:gap])}', words[gap])
    return None


def _document_title(pieces: list[_Piece], place: int, dice: random.Random) -> _Asked | None:
    """A QA2 question about document ``place``, or None where no sentence is usable."""
    for sentence in pieces[place].sentences:
        if len(sentence.split()) in SENTENCE_WORDS:
            question = f'One document has this sentence:\n"{sentence}"\nWhat is the title of that document?'
            return _Asked(question, " The title of that document is: Document:", pieces[place].title)
    return None


QA1 = Task(
    name="ruler-qa1",
    summary="the missing word of a sentence in one of many documents",
    make=partial(_samples, 0),
    score=contains_any,
    settled=True,
    questions=QUESTIONS,
)
QA2 = Task(
    name="ruler-qa2",
    summary="the title of the document that contains a sentence",
    make=partial(_samples, 1),
    score=contains_any,
    settled=True,
    questions=QUESTIONS,
)
