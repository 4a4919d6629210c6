"""Masks of chunks: the shared band says what transformers' own mask says, and is used only where it may be."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from kvswap.models.masks import DeferredMask, defer_mask


def deferred(tokens: int, padding: torch.Tensor | None = None, function=causal_mask_function) -> DeferredMask:
    return defer_mask(
        batch_size=1,
        q_length=tokens,
        kv_length=tokens,
        q_offset=0,
        kv_offset=0,
        mask_function=function,
        attention_mask=padding,
        allow_is_causal_skip=False,
        device="cpu",
    )


def chunk(mask: DeferredMask, start: int, stop: int) -> torch.Tensor:
    return mask.chunk("sdpa", q_offset=start, q_length=stop - start, sizes=(stop, 0), dtype=torch.float32)


@pytest.mark.parametrize("padding", [None, torch.ones(1, 70, dtype=torch.bool)])
def test_band_is_the_causal_mask_of_every_chunk(padding):
    mask = deferred(70, padding)
    for start, stop in ((16, 32), (32, 48), (48, 70), (16, 32), (60, 70)):  # the last chunk of a prompt may be longer
        got = chunk(mask, start, stop)
        want = sdpa_mask(
            batch_size=1, q_length=stop - start, kv_length=stop, q_offset=start, allow_is_causal_skip=False
        )
        assert got.shape == want.shape and got.dtype == torch.float32
        assert torch.equal(got == 0, want) and torch.equal(got == float("-inf"), ~want)


def test_chunks_share_one_band():
    mask = deferred(64)
    assert chunk(mask, 16, 32).data_ptr() - chunk(mask, 32, 48).data_ptr() == 16 * 4


def test_anything_but_plain_causal_gets_the_models_own_mask():
    padded = torch.ones(1, 64, dtype=torch.bool)
    padded[0, :3] = False
    for mask in (deferred(64, padded), deferred(64, function=sliding_window_causal_mask_function(8))):
        got = chunk(mask, 16, 32)
        assert got.dtype == torch.bool
        assert not torch.equal(got, sdpa_mask(batch_size=1, q_length=16, kv_length=32, q_offset=16))
    assert mask.chunk("eager", q_offset=16, q_length=16, sizes=(32, 0), dtype=torch.float32) is not None
