"""Where an answer came from: the passages of the documents that its tokens attended to most.

Decode steps choose groups of tokens by their estimated share of attention, and ``selection/tally.py`` adds these shares
and their squares up. Here the sums become passages: by squares, which favour what was looked up over what is always
attended to a little, the best stretches of ``PASSAGE_TOKENS`` tokens, none over another, each found in its
document and widened to whole sentences. Sinks and recent window are attended to always and say nothing. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvswap.app.documents import Span
from kvswap.app.prompt import Conversation, Message
from kvswap.models import tokens
from kvswap.selection.tally import Tally

PASSAGE_TOKENS = 32
WIDEST_CHARACTERS = 160
"""How far a passage is widened on each side to the ends of its sentences."""
_PLACES = 4  # stretches that are looked at for each passage that is wanted: some lie in no document
_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\xbb\u201d\u2019)\]]*\s+|\n\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One passage of a document.

    Parameters
    ----------
    document
        The name of the document, or ``message N`` where a message of the conversation is its own document.
    line, page
        Where the passage begins, from 1; page is None where the document has no pages.
    text
        The passage.
    share
        Of the estimated attention to everything that was selected, over all tokens of the answer and all layers.
    """

    document: str
    line: int
    page: int | None
    text: str
    share: float


def find_sources(tokenizer: Any, conversation: Conversation, tally: Tally | None, *, count: int) -> list[Source]:
    """The ``count`` passages of a conversation that ``tally`` has the largest shares of, or fewer; [] without one."""
    if tally is None or not count:
        return []
    shares, squares = (each[0].cpu().numpy() for each in (tally.groups, tally.squares))
    group_tokens, width = tally.group_tokens, max(1, PASSAGE_TOKENS // tally.group_tokens)
    ids, messages, total = conversation.ids, conversation.messages, float(shares.sum())
    found: list[Source] = []
    taken: list[tuple[int, int, int]] = []
    for first in _stretches(squares, width, _PLACES * count):
        start = first * group_tokens
        place = _locate(tokenizer, ids, start, start + PASSAGE_TOKENS, messages)
        if place is None or any(place[0] == n and place[1] < high and low < place[2] for n, low, high in taken):
            continue
        taken.append(place)
        found.append(_source(messages[place[0]], *place, float(shares[first : first + width].sum()) / total))
        if len(found) == count:
            break
    return found


def _stretches(squares: NDArray[np.float32], width: int, most: int) -> Iterator[int]:
    """First groups of the best stretches of ``width`` groups, none over another, the best one first."""
    left = squares.astype(np.float64)
    for _ in range(most):
        sums = np.convolve(left, np.ones(width), "valid") if len(left) > width else left.sum(keepdims=True)
        first = int(sums.argmax())
        if sums[first] <= 0:
            return
        yield first
        left[first : first + width] = 0.0


def _locate(
    tokenizer: Any, ids: Sequence[int], start: int, stop: int, messages: Sequence[Message]
) -> tuple[int, int, int] | None:
    """Number of the message that has the text of tokens ``[start, stop)``, and from where to where; None: none has it.

    Of several places with the same text it is the one nearest to where the tokens are in the context.
    """
    text = tokens.decode(tokenizer, list(ids[start:stop]), special=False).strip("\ufffd").strip()
    expected = start / max(1, len(ids)) * sum(len(each.text) for each in messages)
    best, before = None, 0
    for number, message in enumerate(messages):
        at = message.text.find(text) if text else -1
        while at >= 0:
            distance = abs(before + at - expected)
            if best is None or distance < best[0]:
                best = distance, (number, at, at + len(text))
            at = message.text.find(text, at + 1)
        before += len(message.text)
    if best is None:
        return None
    number, low, high = best[1]
    span = _span_at(messages[number], number, low)
    return None if span is None else (number, *_whole_sentences(messages[number].text, low, high, span))


def _span_at(message: Message, number: int, at: int) -> Span | None:
    """The document of ``message`` that has character ``at`` of its text; a question about documents is none."""
    for span in message.documents:
        if span.start <= at < span.stop:
            return span
    if message.documents or message.role == "assistant":
        return None
    return Span(f"message {number + 1}", 0, len(message.text))


def _whole_sentences(text: str, low: int, high: int, span: Span) -> tuple[int, int]:
    """Widen a stretch to the ends of its sentences or lines, within its document and not too far."""
    least = max(span.start, low - WIDEST_CHARACTERS)
    ends = [match.end() for match in _END.finditer(text, least, low)]
    low = ends[-1] if ends else least if least == span.start else low
    after = _END.search(text, max(low, high - 1), min(span.stop, high + WIDEST_CHARACTERS))
    if after is not None:
        high = after.end()
    elif span.stop - high <= WIDEST_CHARACTERS:
        high = span.stop
    return low, min(high, span.stop)


def _source(message: Message, number: int, low: int, high: int, share: float) -> Source:
    span = _span_at(message, number, low)
    assert span is not None
    text = message.text
    page = sum(1 for begin in span.pages if begin <= low - span.start) or None if span.pages else None
    line = span.first_line + text.count("\n", span.start, low)
    return Source(document=span.name, line=line, page=page, text=text[low:high].strip(), share=share)
