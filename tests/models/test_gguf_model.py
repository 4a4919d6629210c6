"""GGUF files run as they are: every family, split files, and what is wrong with a file."""

from __future__ import annotations

import os
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kvswap.errors import ConfigError, MemoryBudgetError, ModelError
from kvswap.models.gguf_model import _module_name, unpacked_bytes
from kvswap.models.loading import load_model
from kvswap.native.library import available
from kvswap.units import format_bytes
from kvswap.weights.gguf_file import GgufFile
from kvswap.weights.modules import PackedEmbedding, PackedLinear, exact, from_pairs, passing_bytes, unpack_modules
from kvswap.weights.placement import weight_bytes
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.packed import packable_model, write_model

pytestmark = pytest.mark.skipif(not available(), reason="nothing was compiled here")
Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300), Q8_0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_computes_what_its_model_did(family, tmp_path):
    original = packable_model(family)
    loaded = load_model(str(write_model(tmp_path / "tiny.gguf", original)))
    ids = torch.arange(2, 42)[None]
    assert torch.allclose(logits(loaded.model, ids), logits(original, ids), atol=1e-4)
    few = torch.arange(2, 6)[None]  # by compiled products
    assert torch.allclose(logits(loaded.model, few), logits(original, few), atol=1e-4)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_are_those_of_the_file(family, tmp_path):
    loaded = load_model(str(write_model(tmp_path / "tiny.gguf", tiny_model(family, vocab_size=300), Q8_0)))
    ids, model = torch.arange(2, 42)[None], loaded.model
    whole = logits(model, ids)
    rounded = torch.cat([logits(model, ids[:, :number])[:, -1] for number in range(1, 9)])
    with exact(model, keep=True):
        assert torch.equal(logits(model, ids), whole)
        unrounded = torch.cat([logits(model, ids[:, :number])[:, -1] for number in range(1, 9)])
    with exact(model, keep=False):
        assert torch.allclose(logits(model, ids), whole, atol=1e-4)
    assert torch.allclose(rounded, unrounded, atol=0.05 * float(unrounded.abs().max()))
    assert not torch.equal(rounded, unrounded)
    unpack_modules(model, torch.float32)
    assert not any(isinstance(each, PackedLinear) for each in model.modules())
    assert torch.allclose(logits(model, ids), whole, atol=1e-4)


def test_weights_are_views_of_the_file(file):
    model = load_model(str(file)).model
    packed = [each.weight for each in model.modules() if isinstance(each, PackedLinear)]
    assert len(packed) == 7 * 3 + 1
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    spans = [line.split(" ")[0].split("-") for line in maps.splitlines() if line.endswith(str(file))]
    for weight in packed if maps else []:
        assert any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in spans)
    copied = load_model(str(file), mmap=False).model
    ids = torch.arange(2, 12)[None]
    assert torch.equal(logits(copied, ids), logits(model, ids))
    for each in copied.modules():
        if isinstance(each, PackedLinear) and maps:
            assert not any(int(low, 16) <= each.weight.data_ptr() < int(high, 16) for low, high in spans)
            assert each.matrix.data == each.weight.data_ptr()


def test_what_unpacking_takes_is_known(file):
    model = load_model(str(file)).model
    kept, panel = passing_bytes(model.model.layers)
    with exact(model.model.layers[0], keep=True):
        held = sum(each._unpacked.nbytes for each in model.modules() if getattr(each, "_unpacked", None) is not None)
    assert 0 < held <= kept and 0 < panel <= kept
    assert passing_bytes(tiny_model("llama").model.layers) == (0, 0)


def test_tokenizer_and_end_come_from_the_file_alone(file):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (file.parent / name).write_text("{}")
    loaded = load_model(str(file))
    assert loaded.tokenizer.decode(loaded.tokenizer("a thing")["input_ids"]) == "a thing"
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 1


def test_a_split_file_is_opened_by_any_part(tmp_path):
    model = tiny_model("llama", vocab_size=300)
    write_model(tmp_path / "tiny.gguf", model, Q8_0, split_max_tensors=12)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    ids = torch.arange(2, 12)[None]
    results = [logits(load_model(str(part)).model, ids) for part in parts]
    assert all(torch.equal(each, results[0]) for each in results)
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"missing of its {len(parts)} parts: {parts[1].name}"):
        load_model(str(parts[0]))


def test_unknown_architectures_are_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_model(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300))
    monkeypatch.setattr("kvswap.models.gguf_model.ARCHITECTURES", {})
    notices: list[str] = []
    assert load_model(str(file), on_notice=notices.append).model.dtype == torch.float32
    assert "does not run packed" in notices[0]


def test_weights_as_floats_or_not(file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = load_model(str(file), weights="float").model
    assert not any(isinstance(each, PackedLinear) for each in model.modules())
    with pytest.raises(ConfigError, match="weights: got 'q5'"):
        load_model(str(file), weights="q5")


@pytest.fixture
def file_to_unpack(tmp_path: Path) -> Path:
    """A file whose matrices have no compiled products."""
    return as_iq4_nl(write_model(tmp_path / "odd.gguf", tiny_model("llama", vocab_size=300), Q4_0))


def as_iq4_nl(file: Path) -> Path:
    """Turn every Q4_0 tensor into IQ4_NL, whose blocks have the same size and other meanings of their codes."""
    whole = bytearray(file.read_bytes())
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type == Q4_0:
            name = tensor.name.encode()
            at = whole.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 8 * len(tensor.shape)
            whole[at : at + 4] = int(gguf.GGMLQuantizationType.IQ4_NL).to_bytes(4, "little")
    file.write_bytes(whole)
    return file


@pytest.mark.parametrize("bfloat16", [False, True])
def test_other_types_are_unpacked_once(file_to_unpack, bfloat16, monkeypatch):
    monkeypatch.setattr("kvswap.weights.modules._multiplies_bfloat16", lambda: bfloat16)
    dtype, notices = torch.bfloat16 if bfloat16 else torch.float32, list[str]()
    model = load_model(str(file_to_unpack), on_notice=notices.append).model
    file, taken_bytes = GgufFile(file_to_unpack), 0
    monkeypatch.setattr("kvswap.weights.modules.dequantise", lambda *_: pytest.fail("unpacked at a use"))
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            tensor = next(each for each in file.tensors.values() if module_name(each.name) == path)
            expected = torch.from_numpy(gguf.dequantize(tensor.data.numpy(), gguf.GGMLQuantizationType(tensor.type)))
            if path.endswith(("q_proj", "k_proj")):
                expected = expected[from_pairs(len(expected), model.config.head_dim)]
            assert torch.equal(module.unpack(), expected.to(dtype).float())
            taken_bytes += module.weight.nbytes
    assert torch.isfinite(logits(model, torch.arange(2, 42)[None])).all()
    assert torch.isfinite(logits(model, torch.arange(2, 6)[None])).all()
    (notice,) = notices
    assert "type IQ4_NL" in notice and format_bytes(taken_bytes) in notice
    mapped_bytes, anonymous_bytes = weight_bytes(model)
    assert mapped_bytes == 0 and anonymous_bytes >= taken_bytes


def module_name(tensor: str) -> str:
    return _module_name("llama", tensor).removesuffix(".weight")


def test_whether_it_fits_is_said_before_loading(file, file_to_unpack, monkeypatch):
    """One line where memory is short, one error where it cannot work, nothing where it fits."""

    def outcome(path: Path, free_bytes: int, *, mmap: bool) -> str:
        monkeypatch.setattr("kvswap.models.loading.available_bytes", lambda: free_bytes)
        notices: list[str] = []
        try:
            load_model(str(path), mmap=mmap, on_notice=notices.append)
        except MemoryBudgetError as error:
            assert "\n" not in error.message and error.hint and not notices
            return "refused"
        return "said" if any("from disk again" in text for text in notices) else "fits"

    packed_bytes = sum(each.data.nbytes for each in GgufFile(file).tensors.values())
    assert [outcome(file, packed_bytes + more, mmap=True) for more in (-1, 0)] == ["said", "fits"]
    assert [outcome(file, packed_bytes + more, mmap=False) for more in (-1, 0)] == ["refused", "fits"]
    tensors = GgufFile(file_to_unpack).tensors.values()
    unpacked = sum(map(unpacked_bytes, tensors))
    vectors = sum(each.data.nbytes for each in tensors if len(each.shape) == 1)
    assert unpacked > 3 * sum(each.data.nbytes for each in tensors if len(each.shape) > 1)
    assert [outcome(file_to_unpack, unpacked + more, mmap=True) for more in (-1, 0, vectors)] == [
        "refused",
        "said",
        "fits",
    ]
    assert [outcome(file_to_unpack, unpacked + vectors + more, mmap=False) for more in (-1, 0)] == ["refused", "fits"]


# ---- bad input


def test_missing_and_unused_tensors_are_named(tmp_path):
    model = tiny_model("llama", vocab_size=300)
    file = write_model(tmp_path / "a.gguf", model, without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lack 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(file))
    notices: list[str] = []
    extra = write_model(
        tmp_path / "b.gguf", model, add=lambda writer: writer.add_tensor("blk.0.odd.weight", np.zeros(4, np.float32))
    )
    load_model(str(extra), on_notice=notices.append)
    assert any("not used: blk.0.odd.weight" in text for text in notices)


def test_shapes_that_do_not_fit(tmp_path):
    model = tiny_model("llama", vocab_size=300)
    model.config.intermediate_size = 32
    with pytest.raises(ModelError, match="has shape"):
        load_model(str(write_model(tmp_path / "a.gguf", model)))


def test_a_file_that_changes_is_noticed(file):
    loaded = load_model(str(file))
    loaded.check_weights()
    os.utime(file, ns=(1, 1))
    with pytest.raises(ModelError, match="was changed while it was in use"):
        loaded.check_weights()
    again = load_model(str(file))
    file.unlink()
    again.check_weights()  # what was mapped is still there


def test_truncated_anywhere(file):
    whole = file.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(whole) - 1, 997), len(whole) - 64]:
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"not a GGUF file|damaged|lack"):
            load_model(str(file))


def test_damaged_headers_give_one_clear_error_or_load(file):
    """Bytes of the header change: the file loads, or there is one error of ours, and never a crash."""
    whole, rng, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(150):
        start = rng.randrange(0, 9000)
        damaged = bytearray(whole)
        damaged[start : start + 8] = rng.choice((b"\xff" * 8, bytes(8), rng.randbytes(8)))
        file.write_bytes(damaged)
        try:
            load_model(str(file))
        except ModelError as error:
            refused += 1
            assert "\n" not in error.message
    assert refused > 40


def test_unknown_type(file):
    whole = file.read_bytes()
    at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    file.write_bytes(whole[:at] + (77).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q\.weight has type 77"):
        GgufFile(file)
