"""Where an answer came from: the right document, line, page and text for what its tokens attended to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings, strategies

import kvswap
from kvswap.app.documents import Document, Span
from kvswap.app.prompt import Conversation, Message, make_request
from kvswap.app.sources import PASSAGE_TOKENS, WIDEST_CHARACTERS, find_sources
from kvswap.errors import DamagedError
from kvswap.selection.tally import Tally
from tests.helpers.folders import CHAT_TEMPLATE, byte_tokenizer, save_tiny

GROUP = 4
TOKENIZER = byte_tokenizer(CHAT_TEMPLATE)  # one token a byte
FILLER = "".join(f"Line {number} says nothing of interest.\n" for number in range(1, 60))
NEEDLE = "The code of the vault is 4711 and nobody else knows."


def conversation(*documents: Document, question: str = "What is the code?") -> Conversation:
    found = Conversation()
    found.add(TOKENIZER, found.prompt(TOKENIZER, [make_request(question, documents)]), [])
    return found


def attended(found: Conversation, *texts: str, share: float = 1.0) -> Tally:
    """A tally in which the tokens of each text got a share, the first one most."""
    tally = Tally(1, len(found.ids) // GROUP + 8, GROUP, torch.device("cpu"))
    whole = TOKENIZER.decode(found.ids).encode()
    for number, text in enumerate(texts):
        start = whole.index(text.encode())
        tally.groups[0, start // GROUP : (start + len(text.encode())) // GROUP] += share / 2**number
    tally.squares = tally.groups**2
    return tally


def with_needle(line: int) -> str:
    lines = FILLER.splitlines()
    return "\n".join([*lines[: line - 1], NEEDLE, *lines[line - 1 :]])


@pytest.mark.parametrize("line", [1, 7, 30, 60])
def test_the_passage_is_named_by_document_and_line(line) -> None:
    found = conversation(Document("a.txt", FILLER), Document("b.txt", with_needle(line)))
    (source,) = find_sources(TOKENIZER, found, attended(found, NEEDLE), count=1)
    assert (source.document, source.line, source.page) == ("b.txt", line, None)
    assert NEEDLE in source.text and 0.5 < source.share <= 1


def test_blank_lines_before_a_text_count() -> None:
    found = conversation(Document("a.txt", "\n \n\n" + with_needle(5)))
    (source,) = find_sources(TOKENIZER, found, attended(found, NEEDLE), count=1)
    assert source.line == 8


def test_pages_are_counted() -> None:
    pages = [FILLER[:200].strip(), FILLER[200:500].strip() + " " + NEEDLE, FILLER[500:700].strip()]
    starts = (0, len(pages[0]) + 2, len(pages[0]) + len(pages[1]) + 4)
    found = conversation(Document("a.pdf", "\n\n".join(pages), starts))
    (source,) = find_sources(TOKENIZER, found, attended(found, NEEDLE), count=1)
    assert source.page == 2


def test_of_equal_texts_the_one_that_was_attended_to() -> None:
    text = FILLER + NEEDLE + "\n" + FILLER
    found = conversation(Document("a.txt", text), Document("b.txt", text))
    tally = attended(found, NEEDLE)
    tally.groups, tally.squares = (
        each.roll(len(text.encode()) // GROUP + 6, 1) for each in (tally.groups, tally.squares)
    )
    (source,) = find_sources(TOKENIZER, found, tally, count=1)
    assert source.document == "b.txt"


def test_best_first_none_over_another_and_no_more_than_wanted() -> None:
    other, third = "Line 20 says nothing of interest.", "Line 50 says nothing of interest."
    found = conversation(Document("a.txt", with_needle(5)))
    tally = attended(found, NEEDLE, other, third)
    sources = find_sources(TOKENIZER, found, tally, count=2)
    assert NEEDLE in sources[0].text and other in sources[1].text and len(sources) == 2
    assert sources[0].share > sources[1].share
    assert find_sources(TOKENIZER, found, tally, count=0) == [] and find_sources(TOKENIZER, found, None, count=3) == []


def test_what_was_looked_up_comes_before_what_is_always_attended_to() -> None:
    found = conversation(Document("a.txt", with_needle(5)))
    tally, other = attended(found, NEEDLE, share=0.5), "Line 40 says nothing of interest."
    tally.groups += attended(found, other, share=1.0).groups  # more in all, but a little at each choice
    sources = find_sources(TOKENIZER, found, tally, count=2)
    assert NEEDLE in sources[0].text and len(sources) == 1


def test_question_and_answers_are_no_source() -> None:
    question = "Which of the many numbers in this document opens the vault, and who has it?"
    found = conversation(Document("a.txt", FILLER), question=question)
    assert find_sources(TOKENIZER, found, attended(found, question), count=3) == []


def test_a_message_without_documents_is_its_own() -> None:
    found = Conversation()
    messages = [Message("user", with_needle(3)), Message("assistant", "Noted."), Message("user", "What is the code?")]
    found.add(TOKENIZER, found.prompt(TOKENIZER, messages), [])
    (source,) = find_sources(TOKENIZER, found, attended(found, NEEDLE), count=1)
    assert (source.document, source.line) == ("message 1", 3)


def test_characters_of_several_bytes_are_cut_nowhere() -> None:
    found = conversation(Document("a.txt", "ü€𝄞" * 200))
    tally = Tally(1, len(found.ids) // GROUP + 1, GROUP, torch.device("cpu"))
    tally.groups[0, 101] = tally.squares[0, 101] = 1.0
    (source,) = find_sources(TOKENIZER, found, tally, count=1)
    assert set(source.text) <= set("ü€𝄞")


@settings(max_examples=60, deadline=None)
@hypothesis_given(
    strategies.lists(strategies.text(min_size=1, max_size=400), min_size=1, max_size=3),
    strategies.integers(0, 2**32 - 1),
)
def test_whatever_was_attended_to_sources_are_parts_of_the_documents(texts, seed) -> None:
    texts = [text.replace("\r", " ") for text in texts]
    documents = [Document(f"{n}", text) for n, text in enumerate(texts) if text.strip()]
    if not documents:
        return
    found = conversation(*documents)
    tally = Tally(1, len(found.ids) // GROUP + 3, GROUP, torch.device("cpu"))
    tally.groups[0] = torch.from_numpy(np.random.default_rng(seed).random(tally.groups.shape[1], np.float32))
    tally.squares = tally.groups**2
    sources = find_sources(TOKENIZER, found, tally, count=5)
    assert sum(each.share for each in sources) <= 1 + 1e-6
    for each in sources:
        document = next(one for one in documents if one.name == each.document)
        assert each.text in document.text
        assert len(each.text) <= PASSAGE_TOKENS + 2 * WIDEST_CHARACTERS
        assert 1 <= each.line <= 1 + document.text.count("\n")


def test_a_session_knows_its_documents_again() -> None:
    found = conversation(Document("a.txt", "\n" + with_needle(4)), Document("p.pdf", "one\n\ntwo", (0, 5)))
    again = Conversation.from_json(found.to_json(), found.ids, "session s")
    assert again.messages == found.messages and again.messages[0].documents[1].pages == (0, 5)
    (source,) = find_sources(TOKENIZER, again, attended(again, NEEDLE), count=1)
    assert (source.document, source.line) == ("a.txt", 5)


def test_sessions_of_before_have_no_names() -> None:
    found = conversation(Document("a.txt", with_needle(4)))
    stored = json.loads(found.to_json())
    del stored["documents"]
    again = Conversation.from_json(json.dumps(stored).encode(), found.ids, "session s")
    (source,) = find_sources(TOKENIZER, again, attended(again, NEEDLE), count=1)
    assert (source.document, source.line) == ("message 1", 4)


BEYOND, BEFORE = [["a", 0, 10**6, [], 1]], [["a", -1, 5, [], 1]]


@pytest.mark.parametrize("spans", [[BEYOND, []], [BEFORE, []], [[["a", 0]], []], [[]], [["a"], []]])
def test_damaged_names_are_damage(spans) -> None:
    found = conversation(Document("a.txt", FILLER))
    stored = {**json.loads(found.to_json()), "documents": spans}
    with pytest.raises(DamagedError):
        Conversation.from_json(json.dumps(stored).encode(), found.ids, "session s")


def test_a_span_is_where_the_text_is() -> None:
    document = Document("a", " \n\n text of it \n", (0, 9))
    span = Span.of(document, 100)
    assert (span.start, span.stop, span.first_line, span.pages) == (100, 110, 3, (0, 5))


def test_an_engine_names_sources_and_a_session_after_it_too(tmp_path, cache_home) -> None:
    folder = save_tiny(tmp_path / "model", max_position_embeddings=8192)
    given = {"select_tokens": 200, "kv_memory": "2MiB", "session": "s", "kv_dir": str(tmp_path / "kv")}
    document = Document("story.txt", FILLER)
    with kvswap.load(str(folder), sources=3, **given) as engine:
        "".join(engine.ask("What of it?", [document], max_new_tokens=8))
        first = engine.stats
    with kvswap.load(str(folder), sources=3, **given) as engine:
        "".join(engine.ask("And what else?", max_new_tokens=8))
        second = engine.stats
    for stats in (first, second):
        assert 1 <= len(stats.sources) <= 3 and 0 < stats.mass_kept < 1
        assert all(each.document == "story.txt" and each.text in FILLER for each in stats.sources)
        assert stats.to_dict()["sources"][0]["document"] == "story.txt"


@pytest.mark.parametrize("least, warned", [(0.0, False), (1.0, True)])
def test_an_answer_that_attended_to_little_says_so(tmp_path, cache_home, monkeypatch, least, warned) -> None:
    monkeypatch.setattr("kvswap.app.engine.LEAST_MASS", least)
    folder, notices = save_tiny(tmp_path / "model", max_position_embeddings=8192), list[str]()
    config = {"select_tokens": 200, "kv_memory": "2MiB", "kv_dir": str(tmp_path / "kv")}
    with kvswap.load(str(folder), on_notice=notices.append, **config) as engine:
        "".join(engine.ask("What of it?", [Document("story.txt", FILLER)], max_new_tokens=4))
        assert any("of the attention only" in each for each in notices) == warned
        assert any("of the attention only" in each for each in engine.stats.notices) == warned
