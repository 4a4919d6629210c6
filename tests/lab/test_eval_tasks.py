"""Samples of every task fit the context, contain their answers and depend on the seed; scores are correct."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvswap.errors import InputError
from kvswap.lab.evals.evaluation_text import evaluation_text
from kvswap.lab.evals.samples import Outcome, Source
from kvswap.lab.evals.tasks import TASKS, find_task
from kvswap.lab.evals.tasks.longbench import f1
from kvswap.lab.evals.tasks.ruler import GRID_DEPTHS
from tests.helpers.folders import byte_tokenizer

ASKING = [name for name in TASKS if name.startswith(("needle", "ruler", "text2json"))]
CONTEXT = 9000


def source(seed: int = 0, **values) -> Source:
    return Source(tokenizer=byte_tokenizer(), passages=evaluation_text((), seed), seed=seed, steps=8, **values)


def outcome(text: str | None) -> Outcome:
    return Outcome(nll=1.0, same=1.0, text=text)


@pytest.mark.parametrize("name", ASKING)
def test_samples_fit_and_contain_their_answers(name):
    task, texts = find_task(name), source()
    samples = list(task.make(texts, CONTEXT, 3))
    assert [each.index for each in samples] == [0, 1, 2]
    assert len({each.prompt_hash for each in samples}) == 3
    for each in samples:
        assert 0.6 * CONTEXT < len(each.prompt) <= CONTEXT
        prompt, forced = (texts.tokenizer.decode(ids) for ids in (each.prompt, each.forced))
        for answer in each.answers:
            for part in answer.split() if name == "text2json" else [answer]:
                assert part in prompt
                assert part in forced or (name == "text2json" and part == each.answers[0].split()[0])
        assert task.score(each, outcome(forced)) == 1
        assert task.score(each, outcome("nothing of the kind")) == 0
    again, other = list(task.make(source(), CONTEXT, 3)), list(task.make(source(1), CONTEXT, 3))
    assert again == samples
    assert not {each.prompt_hash for each in other} & {each.prompt_hash for each in samples}


def test_part_of_the_answers_is_part_of_the_score():
    sample = next(iter(find_task("ruler-mq").make(source(), CONTEXT, 1)))
    assert len(sample.answers) == 4
    assert find_task("ruler-mq").score(sample, outcome(f"{sample.answers[0]}, {sample.answers[3]}")) == 0.5
    sample = next(iter(find_task("text2json").make(source(), CONTEXT, 1)))
    first, second = (answer.split() for answer in sample.answers[:2])
    swapped = f' "{second[1]}", "{second[0]}": "{second[1]}", "{first[0]}x": "{first[1]}"'
    assert find_task("text2json").score(sample, outcome(swapped)) == 1 / 8


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of tokens at the beginning that both share."""
    return next(n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("ruler-mk1", "ruler-mq"), (8, 2)),
        (("ruler-qa1", "ruler-qa2"), (8, 8)),
        (("text2json",), (4,)),
    ],
)
def test_samples_of_one_text_share_a_beginning(names, counts):
    texts = source()
    samples = [each for n, c in zip(names, counts, strict=True) for each in find_task(n).make(texts, CONTEXT, c)]
    assert {each.text for each in samples} == {0, 1}
    for number in (0, 1):
        prompts = [each.prompt for each in samples if each.text == number]
        assert len(set(prompts)) == len(prompts) == len(samples) // 2
        others = [each.prompt for each in samples if each.text != number]
        assert all(common(prompts[0], each) > 0.8 * CONTEXT for each in prompts[1:])
        assert all(common(prompts[0], each) < 0.5 * CONTEXT for each in others)


def test_fewer_samples_are_the_first_ones():
    for name in ("ruler-mk1", "ruler-qa1", "text2json"):
        many, few = (list(find_task(name).make(source(), CONTEXT, count)) for count in (5, 3))
        assert many[:3] == few


def test_needles_lie_at_the_depths_of_the_grid():
    texts = source()
    for each in find_task("needle").make(texts, CONTEXT, len(GRID_DEPTHS)):
        prompt = texts.tokenizer.decode(each.prompt)
        place = prompt.index(each.answers[0]) / len(prompt)
        assert each.labels == {"depth": GRID_DEPTHS[each.index]}
        assert place == pytest.approx(0.03 + 0.94 * each.labels["depth"], abs=0.06)


def test_text_is_cut_apart_and_too_long_a_context_is_refused():
    samples = list(find_task("agreement").make(source(), 5000, 4))
    assert {len(each.prompt) for each in samples} == {5000} and {len(each.forced) for each in samples} == {8}
    assert len({each.prompt_hash for each in samples}) == 4
    with pytest.raises(InputError, match=r"tokens, 10,000,008 are needed; add text with --document"):
        list(find_task("agreement").make(source(), 10**7, 1))
    with pytest.raises(InputError, match="the question alone has"):
        list(find_task("ruler-s1").make(source(), 50, 1))


def rows(path: Path, *lines: object) -> Source:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return source(datasets=[path])


def test_longbench_reads_the_public_form_and_drops_the_middle(tmp_path):
    row = {"input": "Who?", "context": "word " * 3000 + "end", "answers": ["the old man"], "all_classes": None}
    task, texts = find_task("longbench"), rows(tmp_path / "qasper.jsonl", row, {**row, "context": "short"})
    long, short = task.make(texts, 2000, 5)
    prompt = texts.tokenizer.decode(long.prompt)
    assert 1900 < len(long.prompt) <= 2000 and prompt.count("word") > 300 and "end" in prompt
    assert "short" in texts.tokenizer.decode(short.prompt) and long.labels["dataset"] == "qasper"
    assert task.score(long, outcome("An old man.")) == 1
    assert task.score(long, outcome("man")) == pytest.approx(f1("man", "old man")) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: not an object"),
        ({"input": "a", "context": "b"}, "line 2: 'answers' is missing"),
        ({"input": "a", "context": "b", "answers": []}, "line 2: 'answers' is not a list of strings"),
        ({"input": "a", "context": "b", "answers": ["c"], "all_classes": "c"}, "line 2: 'all_classes' is not a list"),
        ({"input": 3, "context": "b", "answers": ["c"]}, "line 2: 'input' is missing or not a str"),
    ],
)
def test_longbench_names_the_line_that_is_wrong(line, message, tmp_path):
    good = {"input": "Who?", "context": "b", "answers": ["c"]}
    with pytest.raises(InputError, match=message):
        list(find_task("longbench").make(rows(tmp_path / "data.jsonl", good, line), 2000, 1))


def test_longbench_without_data(tmp_path):
    with pytest.raises(InputError, match="--dataset"):
        list(find_task("longbench").make(source(), 2000, 1))
    with pytest.raises(InputError, match="empty"):
        list(find_task("longbench").make(rows(tmp_path / "data.jsonl", ""), 2000, 1))
