"""While the memory limit holds the whole cache, nothing is read from disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.models.loading import LoadedModel
from kvswap.sessions.session import Session
from tests.helpers.families import FAMILIES, forced_logits, tiny_model, tokens
from tests.helpers.folders import byte_tokenizer


def config(folder: Any, **changes: Any) -> Config:
    return Config(**{"select_tokens": 100, "recent_tokens": 16, "kv_memory": "32MiB", "kv_dir": str(folder), **changes})


@pytest.mark.parametrize(
    ("family", "batch", "kv_memory"),
    [(family, 1, "32MiB") for family in FAMILIES]
    + [("llama", 2, "32MiB"), ("gemma3", 2, "32MiB"), ("gemma3", 1, "auto")],
)
def test_nothing_is_read_while_everything_fits(family: str, batch: int, kv_memory: str, tmp_path: Any) -> None:
    """Fresh, appended, and grown by more than was planned for; long enough that groups have to be chosen."""
    model = tiny_model(family)
    with attach(model, config(tmp_path, kv_memory=kv_memory)) as cache:
        forced_logits(model, tokens(batch, 700), tokens(batch, 3, seed=1), cache)
        forced_logits(model, tokens(batch, 90, seed=2), tokens(batch, 240, seed=3), cache)
        forced_logits(model, tokens(batch, 530, seed=4), tokens(batch, 5, seed=5), cache)
        stats = cache.stats
        assert (stats.disk_read_bytes, stats.reuse_rate) == (0, 1.0)
        assert stats.selected_groups > 0 and stats.disk_write_bytes > 0
        assert stats.kv_memory_peak_bytes <= stats.kv_memory_limit_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sequences_of_unequal_length_are_kept_whole(family: str, tmp_path: Any) -> None:
    model, mask = tiny_model(family), torch.ones(2, 700, dtype=torch.long)
    mask[0, :500] = 0
    with attach(model, config(tmp_path)) as cache:
        forced_logits(model, tokens(2, 700), tokens(2, 60, seed=1), cache, mask)
        assert cache.stats.disk_read_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_session_reads_each_group_once(family: str, tmp_path: Any) -> None:
    loaded = LoadedModel(tiny_model(family, vocab_size=300), byte_tokenizer(), f"tiny-{family}")
    settings = config(tmp_path, read_gap_bytes=0)
    with Session.create("s", loaded, settings, prompt=tokens(1, 700)[0].tolist()) as session:
        list(session.generate(max_new_tokens=5))
        assert session.cache.stats.disk_read_bytes == 0
    with Session.open("s", loaded, settings) as session:
        list(session.generate(max_new_tokens=150))
        first = session.cache.stats
        assert 0 < first.disk_read_bytes <= first.disk_write_bytes + first.kv_full_bytes
        session.append(tokens(1, 30, seed=1)[0].tolist())
        read = session.cache.stats.disk_read_bytes
        list(session.generate(max_new_tokens=50))
        session.append(tokens(1, 600, seed=2)[0].tolist())
        assert session.cache.stats.disk_read_bytes == read


def test_what_is_in_memory_does_not_change_the_answer(tmp_path: Any) -> None:
    """The same logits, bit for bit, whether groups are read, were written just now, or streamed for a prompt."""
    model, seen = tiny_model("llama"), []
    for kv_memory in (1_500_000, 2_000_000, 3_000_000, "32MiB"):
        with attach(model, config(tmp_path, kv_memory=kv_memory)) as cache:
            logits = [forced_logits(model, tokens(1, 700), tokens(1, 20, seed=1), cache)]
            logits.append(forced_logits(model, tokens(1, 300, seed=2), tokens(1, 20, seed=3), cache))
            seen.append((torch.cat(logits), cache.stats.disk_read_bytes))
    assert all(torch.equal(logits, seen[0][0]) for logits, _ in seen)
    assert [read for _, read in seen] == sorted((read for _, read in seen), reverse=True)
    assert seen[0][1] > seen[-1][1] == 0
