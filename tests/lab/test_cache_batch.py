"""Caches in a batch give the same results as each alone, and the same answers as ``generate``."""

from __future__ import annotations

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach_each
from kvswap.lab.evals.cache_batch import force_batched, greedy_batched
from kvswap.lab.evals.teacher_forcing import ForcedRun, force, share_prompt
from kvswap.lab.rivals.registry import with_methods
from tests.helpers.families import tiny_model, tokens


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    """Put calibrations into a folder of the test run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


METHODS = ("full", "kvswap", "kvswap-paper", "window", "reload", "quest")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_batched_steps_equal_steps_alone(family, tmp_path):
    model, ids = tiny_model(family), tokens(1, 700)[0].tolist()
    config = Config(kv_dir=str(tmp_path), select_tokens=100, recent_tokens=16)
    methods = [(name, config) for name in METHODS if family != "gemma3" or name != "quest"]
    calls: list[tuple[int, int]] = []
    with attach_each(model, with_methods(methods * 2), tokenizer=_Tokenizer()) as caches:
        row = share_prompt(model, caches, ids[:680])
        batched, alone = ({name: c for (name, _), c in zip(methods, part, strict=True)} for part in halves(caches))
        found = force_batched(model, batched, ids[680:], row, on_step=lambda *each: calls.append(each))
        expected = {name: ForcedRun() for name in alone}
        force(model, alone, ids[680:], dict.fromkeys(alone, row), expected)
        assert [cache.get_seq_length() for cache in caches] == [700] * len(caches)
    assert calls == [(n + 1, 20) for n in range(20)]
    for name, run in found.items():
        assert run.kl == pytest.approx(expected[name].kl, rel=0.02, abs=1e-6)
        assert [run.first_nll, *run.nll] == pytest.approx([expected[name].first_nll, *expected[name].nll], abs=1e-4)
        assert run.expected == expected[name].expected and len(run.expected) == 20
    assert max(found["window"].kl) > 5e-6  # methods do differ


def test_rows_answer_as_generate_does_and_stop_separately(tmp_path):
    model, ids = tiny_model("llama"), tokens(1, 90)[0].tolist()
    config = Config(kv_dir=str(tmp_path))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, 90:].tolist()
    stop = expected[4]
    methods = [("full", config), ("full", config), ("kvswap", config)]
    with attach_each(model, with_methods(methods)) as (full, *caches):
        row = share_prompt(model, [full, *caches], ids)
        assert greedy_batched(model, caches, row, 9, stops=lambda found: False) == [expected] * 2
    with attach_each(model, with_methods(methods)) as (full, *caches):
        row = share_prompt(model, [full, *caches], ids)
        found = greedy_batched(model, caches, row, 9, stops=lambda found: found[-1] == stop)
    assert found == [expected[: expected.index(stop) + 1]] * 2


def halves(items: list) -> tuple[list, list]:
    return items[: len(items) // 2], items[len(items) // 2 :]


class _Tokenizer:
    """Calibrates on random tokens."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": tokens(1, 600, seed=3)[0].tolist()}
