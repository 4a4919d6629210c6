from __future__ import annotations

import hashlib
from pydoc_data.topics import topics

import pytest

from kvswap.core.corpus import LARGEST_OVERLAP, calibration_topics, evaluation_topics, lines, overlap


@pytest.fixture(scope="module")
def halves() -> tuple[dict[str, str], dict[str, str]]:
    return dict(calibration_topics()), dict(evaluation_topics())


def test_calibration_is_the_even_half(halves: tuple[dict[str, str], dict[str, str]]) -> None:
    calibration, _ = halves
    even = {name for name in topics if hashlib.sha256(name.encode()).digest()[-1] % 2 == 0}
    assert set(calibration) == even
    assert all(calibration[name] == topics[name] for name in calibration)


def test_nothing_evaluated_was_calibrated_on(halves: tuple[dict[str, str], dict[str, str]]) -> None:
    calibration, evaluation = halves
    assert evaluation
    assert not set(calibration) & set(evaluation)
    calibrated = {line.strip() for text in calibration.values() for line in text.splitlines()} - {""}
    for name, text in evaluation.items():
        own = [line.strip() for line in text.splitlines() if line.strip()]
        assert sum(line in calibrated for line in own) <= 0.05 * len(own), name


def test_only_overlap_keeps_a_topic_out_of_evaluation(halves: tuple[dict[str, str], dict[str, str]]) -> None:
    calibration, evaluation = halves
    seen = {line for text in calibration.values() for line in lines(text)}
    for name in set(topics) - set(calibration) - set(evaluation):
        assert overlap(topics[name], seen) > LARGEST_OVERLAP, name


def test_order_is_by_name_whatever_the_python() -> None:
    for half in (calibration_topics(), evaluation_topics()):
        names = [name for name, _ in half]
        assert names == sorted(names)


def test_overlap_counts_stripped_lines_that_are_not_blank() -> None:
    assert lines(" a \n\n\tb\n   \na") == ["a", "b", "a"]
    assert overlap(" a \n\nb\na\nc", {"a", "x"}) == 0.5
    assert overlap("\n \n", {"a"}) == 0.0
