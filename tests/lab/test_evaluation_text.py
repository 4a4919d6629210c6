"""The evaluation text does not overlap the calibration text."""

from __future__ import annotations

import pytest

from kvswap.app.documents import Document
from kvswap.core.corpus import LARGEST_OVERLAP, calibration_topics, lines, overlap
from kvswap.errors import InputError
from kvswap.lab.evals.evaluation_text import evaluation_text, module_docstrings


def test_no_text_overlaps_what_was_calibrated_on():
    seen = {line for _, text in calibration_topics() for line in lines(text)}
    passages = evaluation_text()
    assert len(passages) > 60
    assert max(overlap(text, seen) for _, text in passages) <= LARGEST_OVERLAP
    assert sum(len(text) for _, text in passages) > 500_000


def test_a_document_that_was_calibrated_on_is_refused():
    name, text = calibration_topics()[0]
    with pytest.raises(InputError, match=f"document {name}: 100% of its lines"):
        evaluation_text([Document(name, text)])


def test_documents_are_not_mixed_with_other_text():
    mine = Document("mine", "A line that exists nowhere else.\n" * 20)
    assert evaluation_text([mine], 1) == evaluation_text([mine], 2) == [("mine", mine.text)]


def test_the_seed_decides_the_order():
    first, again, other = (evaluation_text((), seed) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)


def test_docstrings_of_a_module_are_the_longer_ones_without_duplicates():
    long = "word " * 50 + "end"
    source = f'"""{long}"""\ndef f():\n    """Short."""\n'
    source += f'class C:\n    """{long}"""\n    def m(self):\n        """{long} m"""\n'
    assert module_docstrings(source) == [long, f"{long} m"]
