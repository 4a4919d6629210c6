"""The defaults follow from the committed tables of several models, and the docs show these tables."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from benchmarks import kl_bounds
from benchmarks.defaults import comparisons, load_results, markdown, unsteadiness
from kvswap.config import Config
from kvswap.tuning.tables import sketch_sizes

ROOT = Path(__file__).parents[2]
DOUBLING = 1.33
"""Doubling the group size is accepted while it multiplies KL by less than this."""
RICHER = 1.1
"""The default sketch is the smallest whose KL is at most this many times that of twice the bytes."""


@pytest.fixture(scope="module")
def means() -> dict[str, float]:
    """KL relative to the defaults, geometric mean over models."""
    columns = [comparisons(each) for each in load_results()]
    assert len(columns) >= 2
    return {key: math.exp(sum(math.log(column[key]) for column in columns) / len(columns)) for key in columns[0]}


def test_group_size_is_the_last_that_doubles_cheaply(means: dict[str, float]) -> None:
    chosen = 1
    while 2 * chosen <= 16 and means[f"G = {2 * chosen}"] < DOUBLING * means[f"G = {chosen}"]:
        chosen *= 2
    assert chosen == Config().group_tokens


def test_sketch_is_as_good_as_one_of_twice_the_bytes(means: dict[str, float]) -> None:
    assert RICHER * means["sketch: twice the bytes"] >= 1


def test_half_the_sketch_is_not_as_good(means: dict[str, float]) -> None:
    assert means["sketch: half the bytes"] > RICHER and means["sketch: a quarter"] > RICHER
    assert means["sketch: the same bytes in 2 bit"] > 0.95  # which scores twice the rows
    for elements in (128, 192, 1024):
        default = sketch_sizes(elements)[0]
        assert default.token_bytes == Config().sketch_bytes(elements) and default.bits == Config().sketch_bits


def test_selection_by_layer_gains_too_little_to_be_the_default(means: dict[str, float]) -> None:
    assert Config().layer_select_tokens is None
    assert means["budgets by layer"] > 0.9


def test_ratios_by_text_are_steadier_than_those_of_means() -> None:
    """This is why the tuner compares settings text by text. It holds over all models, not for each one."""
    plain, paired = zip(*(unsteadiness(facts) for facts in load_results()), strict=True)
    assert math.hypot(*paired) < 0.95 * math.hypot(*plain)


def test_evaluation_texts_stay_below_the_bound() -> None:
    """Nine of ten unseen texts should stay below the bound. There are 8 of each model, so shares go in eighths."""
    found = list(kl_bounds.compare())
    for model in kl_bounds.RUNS:
        own = [each for each in found if each.model == model]
        assert len(own) >= 4
        assert sum(each.below for each in own) >= 0.8 * sum(len(each.kl_by_text) for each in own), model
        for each in own:  # the measured mean is below the bound, too
            assert (
                each.predicted.expected < each.predicted.bound
                and statistics.fmean(each.kl_by_text) <= each.predicted.bound
            )


def test_docs_show_the_tables() -> None:
    settings, tuning = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("settings.md", "tuning.md"))
    assert "\n".join(markdown(load_results())) in settings, "run: python benchmarks/defaults.py"
    assert "\n".join(kl_bounds.markdown(list(kl_bounds.compare()))) in tuning, "run: python benchmarks/kl_bounds.py"
