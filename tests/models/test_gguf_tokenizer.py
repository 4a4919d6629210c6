"""Tokenizers of GGUF files are kept in the cache folder, and what is kept there is what the file says."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from kvswap.errors import ModelError
from kvswap.models import gguf_tokenizer
from kvswap.models.gguf_tokenizer import tokenizer_of
from kvswap.weights.gguf_file import GgufFile
from tests.helpers.families import tiny_model
from tests.helpers.packed import write_model

TEXT = "a thing, two\nand  three"


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(gguf_tokenizer, "LEAST_TOKENS", 0)
    return write_model(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300), gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("tokenizer-*.json"))


def never(*_):
    raise AssertionError("the file's tokenizer is read anew")


def facts(tokenizer) -> tuple:
    ids = tokenizer(TEXT)["input_ids"]
    special = tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.chat_template, tokenizer.padding_side
    return ids, tokenizer.decode(ids), tokenizer.get_vocab(), tokenizer.tokenize("</s>"), *special


def test_the_second_time_it_comes_from_the_cache_and_is_the_same(file, cache, monkeypatch):
    first = tokenizer_of(GgufFile(file))
    assert len(kept(cache)) == 1
    monkeypatch.setattr(gguf_tokenizer, "_described", never)
    assert facts(tokenizer_of(GgufFile(file))) == facts(first)


def test_a_small_vocabulary_is_not_kept(file, cache, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "LEAST_TOKENS", 301)
    tokenizer_of(GgufFile(file))
    assert kept(cache) == []


def test_a_changed_header_or_library_is_read_anew(file, cache, monkeypatch):
    first = tokenizer_of(GgufFile(file))
    write_model(file, tiny_model("llama", vocab_size=320), gguf.GGMLQuantizationType.Q8_0)
    assert len(tokenizer_of(GgufFile(file))) == len(first) + 20
    monkeypatch.setattr(gguf_tokenizer.tokenizers, "__version__", "other")
    tokenizer_of(GgufFile(file))
    assert len(kept(cache)) == 3


@pytest.mark.parametrize(
    "damage", [lambda kept: kept[:-9], lambda kept: b"", lambda kept: kept.replace(b"a", b"b", 40)]
)
def test_what_is_not_as_it_was_written_does_not_count(damage, file, cache):
    first = tokenizer_of(GgufFile(file))
    (path,) = kept(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert facts(tokenizer_of(GgufFile(file))) == facts(first)
    assert path.read_bytes() == whole


def test_a_cache_that_takes_nothing_is_no_error(file, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_tokenizer, "atomic_write", full)
    assert tokenizer_of(GgufFile(file))("a thing")["input_ids"]
    assert kept(cache) == []


def test_a_vocabulary_that_cannot_be_read_is_one_line(file, cache):
    header = file.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mxdel")
    file.write_bytes(header)
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        tokenizer_of(GgufFile(file))
    assert kept(cache) == []
