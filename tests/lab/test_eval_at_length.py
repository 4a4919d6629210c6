"""Tasks that ask much about one long text: shared prompts, answers that grow with the text, and where texts begin."""

from __future__ import annotations

import json
import random

import pytest

from kvswap.errors import InputError
from kvswap.lab.evals.results import summarise
from kvswap.lab.evals.samples import DOCUMENTS, Outcome, Sample, Source
from kvswap.lab.evals.tasks import TASKS, find_task
from kvswap.lab.evals.tasks.facts import text_samples
from kvswap.lab.evals.tasks.ruler import GRID_DEPTHS
from kvswap.lab.evals.tasks.text2json import count_names
from kvswap.lab.plots import needle_grids
from kvswap.lab.tables import quality_lines
from tests.helpers.folders import byte_tokenizer
from tests.lab.test_eval_results import record

FACTS = ("facts-one", "facts-all", "facts-values", "facts-json")
CONTEXT = 5000


def prose(characters: int = 60_000) -> str:
    """Sentences of invented words, none of which is a document of Python."""
    dice = random.Random(7)
    words = ["".join(dice.choices("abcdefghijklmno", k=dice.randint(3, 9))) for _ in range(400)]
    found = ""
    while len(found) < characters:
        found += " ".join(dice.choices(words, k=12)).capitalize() + ". "
    return found


def source(text: str, seed: int = 0) -> Source:
    return Source(tokenizer=byte_tokenizer(), passages=[("mine", text)], seed=seed, steps=8, kind=DOCUMENTS)


@pytest.fixture(scope="module")
def texts() -> Source:
    return source(prose())


@pytest.fixture(scope="module")
def facts(texts) -> dict[str, list[Sample]]:
    """All questions about two texts, by task."""
    return {name: list(find_task(name).make(texts, CONTEXT, 2 * find_task(name).questions)) for name in FACTS}


def test_nine_questions_share_all_of_a_text_but_its_end(facts):
    assert [len(facts[name]) for name in FACTS] == [10, 2, 2, 4]
    by_text: dict[int, list[tuple[int, ...]]] = {}
    for each in (sample for own in facts.values() for sample in own):
        by_text.setdefault(each.text, []).append(each.prompt)
    assert {text: len(set(prompts)) for text, prompts in by_text.items()} == {0: 9, 1: 9}
    for prompts in by_text.values():
        shared = next(n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
        assert shared > CONTEXT - 900


def test_questions_fit_and_their_answers_score(texts, facts):
    for name, each in ((name, sample) for name, own in facts.items() for sample in own):
        assert 0.9 * CONTEXT < len(each.prompt) <= CONTEXT
        prompt, forced = (texts.tokenizer.decode(ids) for ids in (each.prompt, each.forced))
        assert all(word in prompt for answer in each.answers for word in answer.split())
        scores = [find_task(name).score(each, Outcome(nll=1.0, same=1.0, text=text)) for text in (forced, "none")]
        assert scores == [1, 0]
        assert each.max_new_tokens > len(each.forced)


def test_each_text_is_built_once_for_all_tasks(texts, facts, monkeypatch):
    monkeypatch.setattr("kvswap.lab.evals.tasks.facts.text_samples", lambda *_: pytest.fail("built again"))
    assert list(find_task("facts-one").make(texts, CONTEXT, 10)) == facts["facts-one"]


def test_keys_lie_at_the_depths_of_the_grid(texts, facts):
    for each, depth in zip(facts["facts-one"], 2 * GRID_DEPTHS, strict=True):
        prompt = texts.tokenizer.decode(each.prompt)
        assert each.labels == {"depth": depth}
        assert prompt.index(each.answers[0]) / len(prompt) == pytest.approx(0.03 + 0.94 * depth, abs=0.06)


def test_a_question_asks_for_what_only_its_text_says(texts, facts):
    one, every, values = (facts[name][0] for name in FACTS[:3])
    assert one.answers[0] == every.answers[0] and len(every.answers) == 5 and len(values.answers) == 4
    assert not set(every.answers) & set(values.answers)
    halves = [{answer.split()[0] for answer in each.answers} for each in facts["facts-json"][:2]]
    assert len(halves[0] | halves[1]) == count_names(CONTEXT)
    twin = text_samples(source(prose()), CONTEXT, 0)
    assert [each.prompt for each in twin[:5]] == [each.prompt for each in facts["facts-one"][:5]]
    other = text_samples(source(prose(), seed=1), CONTEXT, 0)
    assert not {each.prompt for each in other} & {each.prompt for each in twin}


def test_what_is_collected_grows_with_the_context_and_the_answer_fits(texts):
    assert [count_names(context) for context in (900, 8192, 16_384, 32_000, 32_768)] == [16, 16, 32, 64, 64]
    short, long = (next(iter(find_task("text2json").make(texts, context, 1))) for context in (CONTEXT, 12_500))
    assert (len(short.answers), len(long.answers)) == (8, 16)
    for each in (short, long):
        assert each.max_new_tokens >= 1.2 * len(each.forced)
    answer = {name: int(code) for name, code in (each.split() for each in long.answers)}
    given = json.dumps({**answer, "another": 1}).split(":", 1)[1]
    score = find_task("text2json").score
    assert score(long, Outcome(nll=1.0, same=1.0, text=given)) == 1
    cut = given[: given.index('"' + list(answer)[4])]  # four fields, then the answer breaks off
    assert score(long, Outcome(nll=1.0, same=1.0, text=cut)) == 4 / 16


@pytest.mark.parametrize("name", [name for name in TASKS if name != "longbench"])
def test_every_task_takes_its_text_from_the_documents_and_says_so(name, texts):
    task = find_task(name)
    prompt = texts.tokenizer.decode(next(iter(task.make(texts, 5000, 1))).prompt)
    words = set(texts.passages[0][1].split())
    share = sum(word in words for word in prompt.split()) / len(prompt.split())
    assert (share < 0.2) if task.text_kind == "noise" else (share > 0.6)


def test_texts_begin_apart_and_go_round():
    text = prose(30_000)
    texts = source(text)
    starts = [text.index("".join(texts.text_from(number))[:300]) / len(text) for number in range(8)]
    gaps = [b - a for a, b in zip(sorted(starts), [*sorted(starts)[1:], 1 + min(starts)], strict=True)]
    assert min(gaps) > 0.6 / 8
    whole = "".join(texts.text_from(3))
    assert len(whole) == len(text) and whole in text + text
    several = Source(tokenizer=byte_tokenizer(), passages=[("a", "one "), ("b", ""), ("c", "two ")], seed=5, steps=2)
    assert {"".join(several.text_from(number)) for number in range(40)} == {
        "one two "[n:] + "one two "[:n] for n in range(8)
    }
    assert texts.about_tokens() == len(text)  # bytes


@pytest.mark.parametrize("name", ["needle", "text2json", "facts-one", "ruler-qa1", "agreement"])
def test_too_short_a_text_is_refused(name):
    with pytest.raises(InputError, match=r"the text (is too short|has \S+ tokens).*--document"):
        list(find_task(name).make(source(prose(6000)), 20_000, 1))


def test_overlapping_texts_are_noted():
    rows = [record("full", i, 1.0, text_tokens=700) for i in range(8)]
    assert summarise(rows)[0]["note"].startswith("the texts overlap, so the standard error is too small")
    assert summarise([{**row, "text_tokens": 800} for row in rows])[0]["note"] == ""
    assert summarise([{**row, "text_tokens": None} for row in rows])[0]["note"] == ""


def test_needle_grids_are_of_every_task_with_depths():
    records = [record("full", i, i / 2, task=task, depth=0.25) for i in (0, 1, 2) for task in ("needle", "facts-one")]
    grids = needle_grids([*records, record("full", 0, 1.0)])
    assert grids == {"needle, full": {(0.25, 100): 0.5}, "facts-one, full": {(0.25, 100): 0.5}}


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ({}, "Text: Python documentation."),
        ({"documents": []}, "Text: Python documentation."),
        ({"documents": ["book.txt", "b.pdf"]}, "Text: book.txt, b.pdf (of the user's)."),
    ],
)
def test_tables_say_what_text_they_are_of(identity, words):
    known = {"model": "m", "dtype": "float32", "config": {"select_tokens": "auto"}, "seed": 0, "kvswap_version": "1"}
    content = {
        "identity": {**known, **identity},
        "machine": {"system": "s", "torch": "2"},
        "results": summarise([record("full", 0, 1.0), record("x", 0, 1.0)]),
    }
    assert words in quality_lines(content)[-2]
