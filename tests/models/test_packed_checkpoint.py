"""Checkpoints that are packed once: what is packed and what is not, the file in the cache, and what is refused."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from kvswap.app.engine import Engine, load
from kvswap.disk.folders import calibration_folder, models_folder
from kvswap.errors import ConfigError, ModelError, SessionError, StorageError
from kvswap.models import checkpoint, packed_checkpoint
from kvswap.models.adapter import inspect
from kvswap.models.checkpoint_files import checkpoint_identity
from kvswap.models.identity import attention_fingerprint, weights_hash
from kvswap.models.loading import load_model
from kvswap.native.library import available
from kvswap.weights.modules import PackedEmbedding, PackedLinear, exact
from kvswap.weights.placement import weight_bytes
from tests.helpers.families import FAMILIES, other_model, tiny_model, tokens
from tests.helpers.folders import byte_tokenizer, save_tiny
from tests.helpers.packed import write_model

pytestmark = pytest.mark.skipif(not available(), reason="nothing was compiled here")
Q4_0, Q8_0 = 2, 8
IDS = torch.arange(2, 42)[None]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KVSWAP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny(tmp_path / "m", family="qwen2", tie_word_embeddings=False)


def save(folder: Path, model: nn.Module) -> str:
    model.save_pretrained(folder)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with exact(model, keep=False):
        return model(ids).logits  # type: ignore[no-any-return]


def packed_files() -> list[Path]:
    return sorted(models_folder().iterdir())


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("family", [*FAMILIES, "nanochat", "gpt-oss (sinks)", "gemma 4"])
def test_packed_weights_are_those_of_the_checkpoint(family, weights, tmp_path):
    """Every matrix is what the package gguf makes of it, and the model computes what it does with these unpacked."""
    original = tiny_model(family, vocab_size=259) if family in FAMILIES else other_model(family)
    for buffer in dict(original.named_buffers()).keys() & original.state_dict().keys():
        original.get_buffer(buffer).fill_(0.7)  # those that a checkpoint has
    model = load_model(save(tmp_path / "m", original), weights=weights).model
    kinds = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            kind = gguf.GGMLQuantizationType(module.kind)
            source = original.get_submodule(path).weight
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(source.detach().numpy(), kind), kind))
            assert torch.equal(module.unpack(), expected)
            kinds.setdefault(int(kind), set()).add(path)
            source.data = expected
    linear = {path: module for path, module in original.named_modules() if type(module) is nn.Linear}
    in_layers = {path for path, module in linear.items() if module.in_features % 32 == 0} - {"lm_head"}
    outside = {path for path, module in original.named_modules() if isinstance(module, nn.Embedding)} | {"lm_head"}
    top = {path for path in in_layers if ".layers." not in path}
    assert kinds == ({Q8_0: in_layers | outside} if weights == "q8" else {Q4_0: in_layers - top, Q8_0: outside | top})
    assert model.lm_head.fine and model.model.layers[0].self_attn.o_proj.fine == (weights == "q8")
    assert model.dtype == torch.float32 and not model.training
    ids = tokens(1, 24)
    assert torch.allclose(logits(model, ids), logits(original, ids), atol=1e-4, rtol=1e-3)


def test_the_second_start_reads_no_weights(folder, monkeypatch):
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    notices: list[str] = []
    first = load_model(str(folder), weights="q8", on_notice=notices.append)
    (file,) = packed_files()
    size = f"{file.stat().st_size / 1024:.1f} KiB"
    assert "once" in notices[0] and size in notices[1] and len(notices) == 2
    monkeypatch.setattr(checkpoint.Checkpoint, "model", lambda *_: pytest.fail("the checkpoint was read"))
    again = load_model(str(folder), weights="q8", on_notice=notices.append)
    assert len(notices) == 2 and packed_files() == [file] and again.file.path == file
    assert torch.equal(logits(again.model), logits(first.model))
    assert again.model.generation_config.eos_token_id == 7 and again.weights == "q8"


def test_weights_are_mapped_from_the_file(folder):
    loaded = load_model(str(folder), weights="q8")
    tensors = loaded.file.tensors.values()
    vectors = sum(each.data.nbytes for each in tensors if len(each.shape) == 1)
    matrices = sum(each.data.nbytes for each in tensors if len(each.shape) > 1)
    if Path("/proc/self/maps").exists():
        assert weight_bytes(loaded.model) == (matrices, vectors)
    copied = load_model(str(folder), weights="q8", mmap=False).model
    assert weight_bytes(copied) == (0, matrices + vectors)
    assert torch.equal(logits(copied), logits(loaded.model))


def test_matrices_of_no_whole_blocks_stay_float(tmp_path):
    original = tiny_model("llama", vocab_size=259, hidden_size=48)
    model = load_model(save(tmp_path / "m", original), weights="q4").model
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear and isinstance(attention.o_proj, PackedLinear)
    assert torch.equal(attention.q_proj.weight, original.model.layers[0].self_attn.q_proj.weight)


def test_tied_tables_are_one(tmp_path):
    model = load_model(save(tmp_path / "m", tiny_model("gemma3", vocab_size=259)), weights="q8").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.scale == 8.0  # the root of its 64 elements


def test_a_checkpoint_of_16_bits_is_packed_from_them(tmp_path, monkeypatch):
    """Also where the processor would have it converted to float32, of which no copy is made."""
    monkeypatch.setattr("kvswap.models.loading.has_bfloat16", lambda: False)
    original = tiny_model("llama", vocab_size=259).to(torch.bfloat16)
    read, dtypes = checkpoint.Checkpoint.model, []

    def model(self, config, dtype):
        found = read(self, config, dtype)
        dtypes.append(found.dtype)
        return found

    monkeypatch.setattr(checkpoint.Checkpoint, "model", model)
    found = load_model(save(tmp_path / "m", original), weights="q8").model.model.layers[0].mlp.up_proj.unpack()
    expected = gguf.quantize(original.model.layers[0].mlp.up_proj.weight.detach().float().numpy(), Q8_0)
    assert dtypes == [torch.bfloat16]
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(expected, gguf.GGMLQuantizationType.Q8_0)))


def test_large_tensors_are_written_in_panels(folder, tmp_path, monkeypatch):
    whole = logits(load_model(str(folder), weights="q4").model)
    shutil.rmtree(models_folder())
    monkeypatch.setattr(packed_checkpoint, "PANEL_BYTES", 1000)  # three rows of 64
    assert torch.equal(logits(load_model(str(folder), weights="q4").model), whole)


# ---- the cache


def test_a_changed_checkpoint_is_packed_anew(folder, tmp_path):
    first = load_model(str(folder), weights="q8")
    moved = shutil.move(folder, tmp_path / "elsewhere" / "m")
    assert load_model(str(moved), weights="q8").file.path == first.file.path
    status = (moved / "model.safetensors").stat()
    model = load_model(str(moved)).model
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    model.save_pretrained(moved)
    os.utime(moved / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    second = load_model(str(moved), weights="q8")
    assert second.file.path != first.file.path
    assert not torch.equal(logits(second.model), logits(first.model))
    os.utime(moved / "model.safetensors")
    assert load_model(str(moved), weights="q8").file.path not in (first.file.path, second.file.path)


def test_a_hub_id_is_known_by_its_revision():
    revisions = [checkpoint_identity("org/model", SimpleNamespace(_commit_hash=each)) for each in ("a", "b", "a")]
    assert (
        revisions[0]
        == revisions[2]
        != revisions[1]
        != checkpoint_identity("org/other", SimpleNamespace(_commit_hash="b"))
    )
    with pytest.raises(ModelError, match="revision is not known"):
        checkpoint_identity("org/model", SimpleNamespace(_commit_hash=None))


@pytest.mark.parametrize("damage", ["truncated", "edited", "emptied", "of another model"])
def test_a_packed_file_that_is_not_as_it_was_written(folder, damage, tmp_path):
    expected = logits(load_model(str(folder), weights="q8").model)
    (file,) = packed_files()
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 40)
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "edited":
        with file.open("r+b") as data:
            data.seek(-5000, os.SEEK_END)
            data.write(b"\x55" * 100)
    else:
        other = save_tiny(tmp_path / "other", family="qwen2", tie_word_embeddings=False, num_hidden_layers=2)
        os.replace(load_model(str(other), weights="q8").file.path, file)
    notices: list[str] = []
    found = logits(load_model(str(folder), weights="q8", on_notice=notices.append).model)
    assert torch.equal(found, expected)
    assert "packed anew" in notices[0] and str(file) in notices[0] and len(notices) == 3
    load_model(str(folder), weights="q8", on_notice=notices.append)
    assert len(notices) == 3


def test_a_file_that_changes_while_it_is_in_use_is_noticed(folder):
    loaded = load_model(str(folder), weights="q8")
    loaded.check_weights()
    os.utime(loaded.file.path)
    with pytest.raises(ModelError, match="was changed while it was in use"):
        loaded.check_weights()


def test_an_interrupt_leaves_nothing(folder, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packed_checkpoint, "check_products", interrupt)
        load_model(str(folder), weights="q8")
    assert packed_files() == []
    load_model(str(folder), weights="q8")
    assert len(packed_files()) == 1


def test_a_full_disk_is_said_before(folder, monkeypatch):
    monkeypatch.setattr(packed_checkpoint, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"needs .* of disk are free.*KVSWAP_HOME"):
        load_model(str(folder), weights="q8")


def test_long_packing_reports_progress(folder, monkeypatch):
    monkeypatch.setattr(packed_checkpoint, "_PROGRESS_S", 0.0)
    notices: list[str] = []
    load_model(str(folder), weights="q8", on_notice=notices.append)
    assert any(text.startswith("packed ") and " of " in text for text in notices)


# ---- what depends on the weights


def test_kinds_of_weights_are_told_apart(tmp_path):
    for hidden in (64, 48):  # with 48, attention has the same numbers in all three
        sizes = {"hidden_size": hidden, "head_dim": hidden // 4}
        name = save(tmp_path / str(hidden), tiny_model("llama", vocab_size=259, **sizes))
        parts = [inspect(load_model(name, weights=weights).model) for weights in ("auto", "q8", "q4")]
        assert len({attention_fingerprint(each) for each in parts}) == 3
        assert len({weights_hash(each) for each in parts}) == 3
        again = inspect(load_model(name, weights="q8").model)
        assert attention_fingerprint(again) == attention_fingerprint(parts[1])
        assert weights_hash(again) == weights_hash(parts[1])


def test_a_session_continues_with_the_same_weights_only(folder, tmp_path):
    def engine(weights: str) -> Engine:
        return load(str(folder), weights=weights, session="s", kv_dir=str(tmp_path / "kv"), kv_memory="4MiB")

    def ask(engine: Engine) -> str:
        return "".join(engine.ask("Who is there?", max_new_tokens=3))

    with engine("q8") as first:
        ask(first)
    (calibration,) = calibration_folder().iterdir()
    fingerprint = attention_fingerprint(inspect(load_model(str(folder), weights="q8").model))
    assert calibration.name.startswith(fingerprint[:24])
    for other in ("auto", "q4"):
        with pytest.raises(SessionError, match="has other weights"), engine(other) as second:
            ask(second)
    with engine("q8") as third:
        ask(third)


# ---- what is refused


def test_what_cannot_be_packed(folder, tmp_path, monkeypatch):
    file = write_model(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300))
    with pytest.raises(ConfigError, match=r"is a \.gguf file, whose weights are packed already"):
        load_model(str(file), weights="q8")
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(ConfigError, match=f"weights q4 with dtype {dtype}"):
            load_model(str(folder), weights="q4", dtype=dtype)
    assert load_model(str(folder), weights="q4", dtype="float32").model.dtype == torch.float32
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="on a GPU"):
        patch.setattr(torch.cuda, "is_available", lambda: True)
        load_model(str(folder), weights="q8")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="nothing was compiled"):
        patch.setattr("kvswap.models.loading.available", lambda: False)
        load_model(str(folder), weights="q8")
    with monkeypatch.context() as patch, pytest.raises(ModelError, match=r"pip install 'kvswap\[gguf\]'"):
        patch.setitem(sys.modules, "gguf", None)
        load_model(str(folder), weights="q8")
    load_model(str(folder), weights="q4")  # which is there already


def test_a_quantised_checkpoint(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\).*--weights auto"):
        load_model(str(folder), weights="q8")


def test_packing_that_saves_nothing(tmp_path):
    """Experts are no linear layers: as float32 they would take twice what they do."""
    name = save(tmp_path / "m", other_model("mixtral").to(torch.bfloat16))
    with pytest.raises(ModelError, match=r"packed, its weights would take .*experts.*--weights auto"):
        load_model(name, weights="q8")
    assert not models_folder().exists()


def by_hand(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(functional.silu(functional.linear(x, self.gate_proj.weight)) * self.up_proj(x))


def by_dtype(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    inner = (functional.silu(self.gate_proj(x)) * self.up_proj(x)).to(self.down_proj.weight.dtype)
    return self.down_proj(inner.to(x.dtype))


def by_rows(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)) * self.up_proj.weight[0].mean()


@pytest.mark.parametrize("forward", [by_hand, by_dtype, by_rows])
def test_families_that_use_weights_in_other_ways(forward, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "m")
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ModelError, match=r"its family does not run with packed weights.*--weights auto") as caught:
        load_model(str(folder), weights="q8")
    assert "\n" not in str(caught.value)
    assert packed_files() == []


def test_a_configuration_that_makes_no_model(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_act": "silu"', '"hidden_act": "nothing"'))
    with pytest.raises(ModelError, match="its configuration makes no model") as caught:
        load_model(str(folder), weights="q8")
    assert "\n" not in str(caught.value)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), weights="q8")
