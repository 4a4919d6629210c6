"""Rows of results: paired with full attention, with standard errors, and with notes for too few samples."""

from __future__ import annotations

import pytest

from kvswap.lab.evals.results import summarise


def record(method: str, index: int, score: float, **changes) -> dict:
    values = {"task": "t", "method": method, "context": 100, "kv_memory": None if method == "full" else "1MiB"}
    values |= {"index": index, "prompt_hash": str(index), "score": score, "kl": score / 10, "same": 1.0}
    values |= {"nll": 2.0, "mass": 0.5, "setting": None, "sketch": "", "text_number": index}
    values |= {"text_kind": "documents", "text_tokens": 10**6}
    values |= {"kv_memory_limit_bytes": None if method == "full" else 5, "kv_memory_peak_bytes": 3}
    return values | changes


def test_rows_are_paired_with_full():
    scores = [(1.0, 0.5), (0.5, 0.5), (1.0, 1.0)]
    records = [record("full", i, full) for i, (full, _) in enumerate(scores)]
    records += [record("x", i, own) for i, (_, own) in enumerate(scores)][::-1]  # in another order
    full, own = summarise(records)
    assert (full["method"], full["kv_memory_limit_bytes"], own["kv_memory_limit_bytes"]) == ("full", None, 5)
    assert own["score"] == pytest.approx(2 / 3) and own["full_score"] == pytest.approx(2.5 / 3)
    assert own["retention"] == pytest.approx(0.8)
    residuals = [0.5 - 0.8 * 1.0, 0.5 - 0.8 * 0.5, 1.0 - 0.8 * 1.0]  # to what the retention expects
    error = (1.5 * sum(each**2 for each in residuals)) ** 0.5 / 3 / (2.5 / 3)
    assert own["retention_stderr"] == pytest.approx(error) and full["retention_stderr"] == 0
    assert own["difference"] == pytest.approx(-0.5 / 3)
    assert own["difference_stderr"] == pytest.approx(0.5 / 3)  # of -0.5, 0, 0
    assert own["stderr"] == pytest.approx(0.5 / 3)
    assert own["nll_difference"] == own["nll_difference_stderr"] == 0
    assert own["note"] == "only 3 samples: the standard error is itself uncertain"


def test_one_sample_and_nothing_to_retain():
    _, own = summarise([record("full", 0, 0.0), record("x", 0, 0.0)])
    assert own["stderr"] is None and own["retention"] is None and own["retention_stderr"] is None
    assert own["note"] == "one sample: no standard error; full attention scores 0, so there is nothing to retain"


def test_enough_samples_need_no_note():
    rows = summarise([record(method, i, 1.0) for i in range(8) for method in ("full", "x")])
    assert [row["note"] for row in rows] == ["", ""]
    assert rows[1]["retention"] == 1 and rows[1]["retention_stderr"] == 0


def test_samples_of_one_text_are_one_cluster():
    scores = [1.0, 1.0, 0.0, 0.5]  # of texts 0, 0, 1, 2
    records = [record("full", i, score, text_number=max(0, i - 1)) for i, score in enumerate(scores)]
    (row,) = summarise(records)
    assert (row["n"], row["texts"], row["score"]) == (4, 3, 0.625)
    sums = [0.75, -0.625, -0.125]  # of what differs from the mean
    assert row["stderr"] == pytest.approx((1.5 * sum(each**2 for each in sums)) ** 0.5 / 4)
    assert row["note"] == "only 3 texts: the standard error is itself uncertain"
    (row,) = summarise(records[:2])
    assert row["stderr"] is None and row["note"] == "2 samples of one text: no standard error"


def test_settings_have_rows_of_their_own():
    records = [record("x", 0, 1.0, setting=setting) for setting in ("tight", "relaxed")]
    assert [row["setting"] for row in summarise([record("full", 0, 1.0), *records])] == [None, "tight", "relaxed"]
