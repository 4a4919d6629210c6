"""What packing costs on a real model: KL of a packed checkpoint's compiled steps to the same checkpoint in float32."""

from __future__ import annotations

import os
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.compiled_step import CompiledDecode
from kvswap.core.corpus import calibration_topics
from kvswap.models.gguf import PACKAGE, bundled_model
from kvswap.models.loading import load_model
from kvswap.native.library import available
from tests.helpers.families import forced_logits, full_cache

CACHE_HOME = os.environ.get("XDG_CACHE_HOME")
PROMPT_TOKENS, STEPS = 512, 256


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="nothing was compiled here")
def test_kl_of_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL of SmolLM2-135M: at most 0.002 with q8. Q4_0 is coarse for a model this small: at most 0.5."""
    if PACKAGE not in {each.name for each in distributions()}:
        pytest.skip(f"{PACKAGE} is not installed")
    if CACHE_HOME is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", CACHE_HOME)
    folder = str(bundled_model(print))
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    loaded = load_model(folder)
    text = "".join(text for _, text in calibration_topics())
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"][: PROMPT_TOKENS + STEPS]])
    prompt, forced = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
    reference = forced_logits(loaded.model, prompt, forced, full_cache(loaded.model)).log_softmax(-1)
    config = Config(select_tokens=6000, store_dtype="float32", kv_memory="512MiB", kv_dir=str(tmp_path / "kv"))
    for weights, bound in (("q8", 0.002), ("q4", 0.5)):
        packed = load_model(folder, weights=weights)
        with attach(packed.model, config) as cache:
            found = forced_logits(packed.model, prompt, forced, cache).log_softmax(-1)
            assert isinstance(cache.decode, CompiledDecode)
        kl = functional.kl_div(found, reference, log_target=True, reduction="sum") / (len(found) * found.shape[1])
        same = (found.argmax(-1) == reference.argmax(-1)).float().mean()
        print(f"{weights}: KL {kl:.5f}, same likeliest token {same:.1%}")
        assert 0 < kl < bound
