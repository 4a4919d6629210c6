"""The benchmark of step time over context length, on small contexts."""

from __future__ import annotations

import dataclasses

import pytest

import kvswap.lab.bench.scale
from kvswap.config import Config
from kvswap.lab.bench.scale import SMOLLM2, fits, kv_bytes, measure_scale
from kvswap.lab.plots import plot_scale

SHAPE = dataclasses.replace(SMOLLM2, layers=3)


def test_steps_parts_and_memory_add_up(tmp_path):
    config = Config(kv_dir=str(tmp_path / "kv"), kv_memory="8MiB")
    done = []
    rows = [
        measure_scale(tokens, 4, config, shape=SHAPE, on_progress=lambda *args: done.append(args))
        for tokens in (2048, 9000)
    ]
    for row in rows:
        assert len(row["step_s"]) == 4
        assert sum(row["parts_s"].values()) == pytest.approx(sum(row["step_s"]) / 4)
        assert all(value >= 0 for name, value in row["parts_s"].items() if name != "other_s")
        assert row["kv_bytes"] == row["tokens"] * 3 * 768
        assert row["read_bytes_per_step"] > 0 and 0 < row["reuse_rate"] < 1
        assert row["memory_bytes_per_token"] * row["tokens"] <= row["kv_memory_limit_bytes"]
    assert done == [("fill", number, 3) for number in (1, 2, 3)] * 2
    assert list((tmp_path / "kv").iterdir()) == []
    plot_scale(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_contexts_that_do_not_fit_the_disk_are_detected(tmp_path, monkeypatch):
    config = Config(kv_dir=str(tmp_path))
    needed = kv_bytes(1 << 20) + kvswap.lab.bench.scale.SPARE_BYTES
    assert 23e9 < kv_bytes(1 << 20) < 25e9
    for free, expected in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(kvswap.lab.bench.scale, "free_bytes", lambda path, free=free: free)
        assert fits(1 << 20, config) is expected
