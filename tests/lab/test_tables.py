"""The table of a results file: paired differences in points, and means with equal weights of tasks."""

from __future__ import annotations

from kvswap.lab.evals.results import summarise
from kvswap.lab.tables import question_table
from tests.lab.test_eval_results import record

SCORES = {"ruler-mk1": [1.0, 1.0, 0.5, 1.0], "ruler-mq": [0.5, 0.5, 0.0, 1.0], "ruler-s1": [1.0, 1.0, 1.0, 1.0]}


def test_lines_and_means():
    records = [record("full", i, 1.0, task=task) for task in SCORES for i in range(4)]
    records += [
        record("x", i, score, task=task, setting="tight") for task, own in SCORES.items() for i, score in enumerate(own)
    ]
    lines = question_table(summarise(records))
    assert lines[0] == "| context | task | n (texts) | full | x tight |"
    assert lines[2] == "| 100 | `ruler-mk1` | 4 (4) | 1.000 | 0.875 (-12.5 ± 12.5), 0.088 |"
    assert lines[4] == "| 100 | `ruler-s1` | 4 (4) | 1.000 | 1.000 (+0.0 ± 0.0), 0.100 |"
    assert lines[5] == "| 100 | several facts: score of full |  | 1.000 | **68.8%** ± 12.0 |"  # of 0.875 and 0.5
    assert lines[6] == "| 100 | all but the needle grid: score of full |  | 1.000 | **79.2%** ± 8.0 |"


def test_tasks_that_full_attention_fails_do_not_count_in_means():
    scores = {"ruler-mk1": 1.0, "ruler-mq": 0.5, "ruler-qa2": 0.0, "needle": 1.0, "agreement": 1.0}
    records = [record(method, i, s, task=t) for t, s in scores.items() for i in range(2) for method in ("full", "x")]
    lines = question_table(summarise(records))
    assert not any("agreement" in line for line in lines)
    assert lines[-1] == "| 100 | all but the needle grid: score of full |  | 0.750 | **100.0%** ± 0.0 |"
