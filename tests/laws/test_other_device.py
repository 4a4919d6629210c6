"""Law 6: on a device that is not the CPU the same tokens, and nothing there meets a tensor of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.attention import chunk_attention
from kvswap.models.loading import LoadedModel
from kvswap.native import loops
from kvswap.sessions.session import Session
from tests.helpers.families import forced_logits, least_memory, tiny_model, tokens
from tests.helpers.folders import byte_tokenizer
from tests.helpers.other_device import OtherTensor, other_device, to_other

FAMILIES = ("llama", "gemma3")


@pytest.fixture(autouse=True)
def scores_as_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of the CPU round queries to integers for scoring, and then some other group may be chosen."""
    monkeypatch.setattr(loops, "available", lambda: False)
    monkeypatch.setattr("kvswap.selection.sketch.prefers_integers", lambda *_: False)


def on_both(family: str, run: Callable[[Any, Callable[[torch.Tensor], torch.Tensor]], list[torch.Tensor]]) -> None:
    """``run`` a model on the CPU and on the other device; its results have to agree."""
    expected = run(tiny_model(family, vocab_size=300), lambda tensor: tensor)
    with other_device() as device:
        found = run(to_other(tiny_model(family, vocab_size=300)), lambda tensor: tensor.to(device))
        assert all(isinstance(each, OtherTensor) for each in found)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine.cpu(), theirs, atol=1e-4)


def test_a_host_tensor_that_meets_the_device_is_found() -> None:
    with other_device() as device, torch.no_grad():
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert float((there + 1).sum()) == 6 and there.device == device and torch.equal(there.cpu(), here)
        for meet in (lambda: there + here, lambda: there[torch.tensor([0])], lambda: torch.cat((here, there))):
            with pytest.raises(RuntimeError, match="host and device meet"):
                meet()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_steps_and_appended_prompts(family: str, tmp_path: Any) -> None:
    """Batch of two, one of them padded; selection, reuse, reads and growth."""
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[0, :40] = 0

    def run(model: Any, there: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        config = Config(select_tokens=60, recent_tokens=16, kv_dir=str(tmp_path))
        config = config.replace(kv_memory=least_memory(model, config, there(tokens(2, 300))) + 50_000)
        with attach(model, config) as cache:
            first = forced_logits(model, there(tokens(2, 300)), there(tokens(2, 10, seed=1)), cache, there(mask))
            assert cache.stats.disk_reads > 0
            return [first]

    on_both(family, run)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_that_grows(family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvswap.config.AUTO_LEAST_TOKENS", 60)
    monkeypatch.setattr("kvswap.core.attach.select_share", lambda *_: 8)

    def run(model: Any, there: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        found = []
        with attach(model, Config(recent_tokens=16, kv_memory="2MiB", kv_dir=str(tmp_path))) as cache:
            for number, count in enumerate((480, 700)):
                new, forced = there(tokens(1, count, seed=2 * number)), there(tokens(1, 5, seed=2 * number + 1))
                found.append(forced_logits(model, new, forced, cache))
                assert cache.stats.select_tokens == (60, 124)[number]
            assert cache.stats.kv_memory_peak_bytes <= cache.stats.kv_memory_limit_bytes
        return found

    on_both(family, run)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_memory", [1_300_000, "8MiB"])
def test_a_session_goes_on_from_what_is_stored(family: str, kv_memory: int | str, tmp_path: Any) -> None:
    config = Config(select_tokens=60, recent_tokens=16, kv_memory=kv_memory)

    def run(model: Any, there: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        folder = str(tmp_path / model.device.type)
        loaded, settings = LoadedModel(model, byte_tokenizer(), "tiny"), config.replace(kv_dir=folder)
        with Session.create("s", loaded, settings, prompt=tokens(1, 200)[0].tolist()) as session:
            list(session.generate(max_new_tokens=4))
        with Session.open("s", loaded, settings) as session:
            session.append(tokens(1, 60, seed=1)[0].tolist())
            list(session.generate(max_new_tokens=4))
            return [there(torch.tensor(session.token_ids))]

    on_both(family, run)


@pytest.mark.parametrize("batch", [1, 2])
def test_grouped_heads_under_a_mask(batch: int) -> None:
    query, keys, values = torch.randn(batch, 6, 5, 8), torch.randn(batch, 2, 9, 8), torch.randn(batch, 2, 9, 8)
    for mask in (torch.ones(batch, 1, 5, 9).tril(4) > 0, torch.randn(1, 1, 5, 9)):
        expected = chunk_attention(query, keys, values, mask, 0.3)
        with other_device() as device, torch.no_grad():
            there = [each.to(device) for each in (query, keys, values, mask)]
            assert torch.allclose(chunk_attention(*there, 0.3).cpu(), expected, atol=1e-6)
