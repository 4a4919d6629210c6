"""A tuned configuration against the published scheme in the same bytes: the comparison and its committed result."""

from __future__ import annotations

import json
import statistics

from benchmarks.kl_bounds import RESULTS
from benchmarks.predictor import beside_tuned
from kvswap.tuning.solution import load_tuned
from tests.tuning.test_solution import solution

BETTER = 3
"""The published scheme's KL must be at least this many times the tuned one."""


def test_both_methods_get_the_limit_of_the_tuned_one_and_the_tight_sketch() -> None:
    tuned = solution(1, 8192, kv_memory="6MiB", sketch_rank=32, sketch_bits=2, layer_select_tokens=None)
    found = beside_tuned(128, tuned)
    assert found["kvswap tuned"] == ("kvswap", tuned.config)
    for method in ("kvswap", "kvswap-paper"):
        name, config = found[f"{method} tight G8"]
        assert name == method and config.kv_memory == tuned.config.kv_memory and config.group_tokens == 8
        assert config.sketch_bytes(128) == 8 and config.select_tokens == 400


def test_tuned_at_the_tight_setting_has_a_third_of_the_published_kl() -> None:
    rows = json.loads((RESULTS / "tuned-tight-qwen05-8k.json").read_text())
    tuned, paper = ([row["methods"][name] for row in rows] for name in ("kvswap tuned", "kvswap-paper tight G8"))
    assert len(rows) >= 4 and all(row["context"] == 8192 for row in rows)
    for ours, theirs, row in zip(tuned, paper, rows, strict=True):
        assert ours["sketch_bytes"] <= theirs["sketch_bytes"]
        assert max(ours["peak"], theirs["peak"]) <= row["kv_memory"]
        assert len(ours["kl"]) == len(theirs["kl"]) >= 32
    found = load_tuned(RESULTS / "tuned-tight-qwen05.json").nearest(context_tokens=8192)
    assert found.values["kv_memory"] == rows[0]["kv_memory"] and found.config.select_tokens == 400
    below = sum(statistics.fmean(each["kl"]) <= found.prediction.kl_bound for each in tuned)
    assert below >= 0.8 * len(rows)
    means = [statistics.fmean(kl for each in side for kl in each["kl"]) for side in (tuned, paper)]
    assert BETTER * means[0] <= means[1]
