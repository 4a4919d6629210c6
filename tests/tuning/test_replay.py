"""Replays: exact steps equal full attention, and steps with a selection equal those of the cache on disk."""

from __future__ import annotations

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.model_patch import Attachment
from kvswap.selection.basis import identity_basis
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.window import Window
from kvswap.tuning.replay import Recording, ReplayCache, Selection
from tests.helpers.families import FAMILIES, forced_logits, full_cache, tiny_model, tokens

PROMPT, STEPS = 512, 5


def replayed(model, ids, forced, prepare) -> tuple[torch.Tensor, ...]:
    """Logits of an exact replay, of two replays with the selection of ``prepare``, and of both kinds in one batch."""
    attachment = Attachment(model)
    try:
        cache = ReplayCache(attachment.parts, attachment.implementation, capacity_tokens=PROMPT, chunk_tokens=512)
        first = forced_logits(model, ids, forced[:, :0], cache)

        def replay(*rows: Selection | None) -> tuple[torch.Tensor, ...]:
            with cache.replay(rows, STEPS):
                each = forced.repeat(len(rows), 1)
                found = forced_logits(model, each[:, :1], each[:, 1:], cache)
            assert cache.padded_tokens == PROMPT
            return tuple(torch.cat((first, row[:, None])) for row in found.unbind(1))

        cache.recording = recording = Recording()
        (exact,) = replay(None)
        assert len(recording.true) == forced.shape[1] and len(recording.true[0]) == len(attachment.parts.offloaded)
        cache.recording = None
        return exact, *replay(prepare(cache)), *replay(prepare(cache)), *replay(prepare(cache), None)
    finally:
        attachment.restore()


def selection(config: Config, cache: ReplayCache) -> Selection:
    """A selection by whole-key codes in two bits, which the cache on disk uses without calibration."""
    parts, sketches = cache.parts, []
    for order in range(len(parts.offloaded)):
        basis = identity_basis(parts.kv_heads * parts.head_dim)
        sketch = LayerSketch(
            batch=1,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            basis=basis,
            bits=2,
            capacity_tokens=PROMPT,
            device=parts.device,
        )
        sketch.append(0, cache.kv[order, 0, 0, :, :PROMPT])
        sketches.append(sketch)
    window = Window(config.group_tokens, config.sink_groups, config.recent_groups, config.select_groups)
    return Selection(window, config.layer_select_groups(len(sketches)), sketches)


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_equal_full_attention_and_the_cache_on_disk(family, tmp_path):
    model, ids, forced = tiny_model(family), tokens(1, PROMPT), tokens(1, STEPS, seed=1)
    layers = 2 if family == "gemma3" else 3
    config = Config(
        kv_dir=str(tmp_path),
        store_dtype="float32",
        group_tokens=16,
        select_tokens=160,
        layer_select_tokens=(128, 192, 160)[:layers],
    )
    exact, once, again, beside, exact_beside = replayed(model, ids, forced, lambda cache: selection(config, cache))
    full = forced_logits(model, ids, forced, full_cache(model))
    assert (exact - full).abs().max() < 1e-4
    assert torch.equal(once, again)  # the second finds everything as the first did
    assert (beside - once).abs().max() < 1e-4 and (exact_beside - exact).abs().max() < 1e-4
    with attach(model, config) as cache:
        on_disk = forced_logits(model, ids, forced, cache)
    assert (once - on_disk).abs().max() < 1e-4
    assert (once - full).abs().max() > 1e-3  # something was left out
