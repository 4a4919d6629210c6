"""Questions over documents, made from passages of the evaluation text: the places of QA1 and QA2 in RULER's list.

QA1: a sentence of one of the documents is given with a word left out, which is asked for. QA2: a sentence is given, and
the title of the document after the one it stands in is asked for, which takes two looks. Both are made from the text
alone, so that they need no data set.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvswap.errors import InputError
from kvswap.evals.samples import Sample, Source, Task, ask, contains_any, fit, forced_answer

PIECE_CHARACTERS = 900
NEW_TOKENS = 24
SENTENCE_WORDS = range(9, 30)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One document of a prompt."""

    title: str
    text: str
    sentences: list[str]


def _pieces(source: Source, dice: random.Random) -> list[_Piece]:
    """The text cut into documents of some hundred tokens each, in an order that ``dice`` decides."""
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


def _documents(pieces: list[_Piece]) -> str:
    return "\n\n".join(f"Document: {piece.title}\n{piece.text}" for piece in pieces)


def _samples(
    name: str, ask_about: Callable[[list[_Piece], random.Random], tuple[int, str, str, str]]
) -> Callable[[Source, int, int], Iterator[Sample]]:
    def make(source: Source, context: int, count: int) -> Iterator[Sample]:
        for index in range(count):
            dice = random.Random(f"{name}/{source.seed}/{index}")
            pieces = _pieces(source, dice)
            place, question, prefix, answer = ask_about(pieces, dice)
            kept = pieces[place : place + 2]
            others = pieces[:place] + pieces[place + 2 :]
            share = dice.random()

            def build(
                n: int,
                kept: list[_Piece] = kept,
                others: list[_Piece] = others,
                share: float = share,
                question: str = question,
                prefix: str = prefix,
            ) -> tuple[int, ...]:
                at = round(share * n)
                return ask(source, _documents([*others[:at], *kept, *others[at:n]]), question, prefix)

            yield Sample(
                context=context,
                index=index,
                prompt=fit(source, context, build, min(len(others), context)),
                forced=forced_answer(source, f" {answer}"),
                answers=(answer,),
                max_new_tokens=NEW_TOKENS,
            )

    return make


def _missing_word(pieces: list[_Piece], dice: random.Random) -> tuple[int, str, str, str]:
    for place in range(len(pieces) - 1):
        for sentence in pieces[place].sentences:
            words = sentence.split()
            long = [n for n, word in enumerate(words) if 3 < n < len(words) - 1 and re.fullmatch(r"[a-z]{7,}", word)]
            if len(words) in SENTENCE_WORDS and long:
                gap = dice.choice(long)
                shown = " ".join([*words[:gap], "____", *words[gap + 1 :]])
                question = f'Which word stands at the gap in this sentence of the documents?\n"{shown}"'
                return place, question, f' The sentence is: "{" ".join(words[:gap])}', words[gap]
    raise InputError("the text has no sentences to ask about", hint="evaluate on more text")


def _next_title(pieces: list[_Piece], dice: random.Random) -> tuple[int, str, str, str]:
    for place in range(len(pieces) - 1):
        for sentence in pieces[place].sentences:
            if len(sentence.split()) in SENTENCE_WORDS:
                question = f'One document has this sentence:\n"{sentence}"\nWhat is the title of the document after it?'
                return place, question, " The title of the document after it is: Document:", pieces[place + 1].title
    raise InputError("the text has no sentences to ask about", hint="evaluate on more text")


QA1 = Task(
    name="ruler-qa1",
    summary="a word of a sentence in one of many documents",
    make=_samples("qa1", _missing_word),
    score=contains_any,
)
QA2 = Task(
    name="ruler-qa2",
    summary="the title after the document of a sentence",
    make=_samples("qa2", _next_title),
    score=contains_any,
)
