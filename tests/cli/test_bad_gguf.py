"""GGUF files that are damaged, incomplete, unknown or too large: exit code 2, and one line that says what to do."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvswap.cli.main import run_command
from kvswap.native.library import available
from tests.cli.conftest import check_refused
from tests.helpers.families import tiny_model
from tests.helpers.packed import write_model

pytestmark = [
    pytest.mark.skipif(not available(), reason="nothing was compiled here"),
    pytest.mark.usefixtures("cache_home"),
]
Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
FIRST_TENSOR, LAST_TENSOR = b"token_embd.weight", b"output.weight"
ENTRY_BYTES = 32  # after a tensor's name: dimensions, shape, type and offset of a matrix
MOST_GROWTH_BYTES = 400 << 20


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Asks a file's model a question; the exit code, and what stderr says beside progress."""

    def call(file: Path, *words: object) -> tuple[int, str]:
        capfd.readouterr()
        base = ["run", "--model", file, "--ask", "Who?", "--max-new-tokens", 2, "--kv-dir", tmp_path / "kv"]
        code = run_command([str(word) for word in [*base, *words]])
        lines = capfd.readouterr().err.splitlines()
        return code, "\n".join(line for line in lines if not line.startswith(("reading", "learning")))

    return call


@pytest.fixture
def refused(run: Callable[..., tuple[int, str]]) -> Callable[..., str]:
    """As ``run``, for what must be one line with a hint."""

    def call(file: Path, *words: object) -> str:
        code, said = run(file, *words)
        check_refused(code, said)
        return said

    return call


def edited(file: Path, at: int, new: bytes) -> Path:
    whole = bytearray(file.read_bytes())
    whole[at : at + len(new)] = new
    file.write_bytes(whole)
    return file


def entry(whole: bytes, name: bytes) -> int:
    """Where the entry of a tensor has its number of dimensions."""
    return whole.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)


# ---- one thing is wrong


def test_the_file_itself_runs(file: Path, run: Callable[..., tuple[int, str]]) -> None:
    assert run(file)[0] == 0


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("empty", "not a GGUF file"),
        ("magic", "not a GGUF file"),
        ("header", "header ends early"),
        ("metadata", "header ends early"),
        ("vocabulary", "header ends early"),
        ("tensor infos", "header ends early"),
        ("first data", "reaches past the end of the file, which is incomplete"),
        ("last data", "reaches past the end of the file, which is incomplete"),
    ],
)
def test_truncated(place: str, words: str, file: Path, sound: bytes, refused: Callable[..., str]) -> None:
    sizes = {
        "empty": 0,
        "magic": 3,
        "header": 13,
        "metadata": sound.index(b"llama.block_count") + 5,
        "vocabulary": sound.index(b"tokenizer.ggml.tokens") + 500,
        "tensor infos": entry(sound, b"blk.1.attn_q.weight") + 7,
        "first data": entry(sound, LAST_TENSOR) + 100,
        "last data": len(sound) - 2000,
    }
    os.truncate(file, sizes[place])
    assert words in refused(file)


def test_magic_and_version(file: Path, refused: Callable[..., str]) -> None:
    line = refused(edited(file, 4, (9).to_bytes(4, "little")))
    assert "version 9 of GGUF is not known, only 2 and 3; convert the model again" in line
    assert "not a GGUF file; give a model directory or a .gguf file" in refused(edited(file, 0, b"GGML"))


@pytest.mark.parametrize(
    ("offset_bytes", "words"),
    [(1 << 40, "output.weight reaches past the end"), ((1 << 64) - 32, "reaches past the end"), (8, "is not aligned")],
)
def test_a_tensor_that_is_elsewhere(
    offset_bytes: int, words: str, file: Path, sound: bytes, refused: Callable[..., str]
) -> None:
    at = entry(sound, LAST_TENSOR) + 4 + 2 * 8 + 4
    assert words in refused(edited(file, at, offset_bytes.to_bytes(8, "little")))


def test_unknown_type(file: Path, sound: bytes, refused: Callable[..., str]) -> None:
    at = entry(sound, b"blk.0.attn_q.weight") + 4 + 2 * 8
    line = refused(edited(file, at, (77).to_bytes(4, "little")))
    assert "tensor blk.0.attn_q.weight has type 77, which is not known; take a file of another type" in line


WEIGHTS = pytest.mark.parametrize("options", [(), ("--weights", "float")])


@WEIGHTS
def test_unknown_architecture(options: tuple[str, ...], file: Path, sound: bytes, refused: Callable[..., str]) -> None:
    """One line, without notices of a conversion that cannot work."""
    at = sound.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
    line = refused(edited(file, at, b"lemur"), *options)
    assert line.endswith(
        "the architecture 'lemur' is not known; take a file of gemma3, llama, mistral, qwen2, qwen3, or give the "
        "model directory it was made from"
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 1 << 30, "it states 1,073,741,824 layers and 30 tensors"),
        ("llama.block_count", 0, "llama.block_count is 0"),
        ("llama.attention.head_count", 5, "it states 5 query heads for 2 key heads"),
        ("llama.attention.head_count", 8, "tensor blk.0.attn_q.weight has shape (64, 64), not (128, 64)"),
        ("llama.attention.head_count_kv", 4, "tensor blk.0.attn_k.weight has shape (32, 64), not (64, 64)"),
        ("llama.attention.key_length", 32, "tensor blk.0.attn_q.weight has shape (64, 64), not (128, 64)"),
        ("llama.attention.key_length", 15, "it states heads of 15 elements"),
        ("llama.embedding_length", 1 << 24, "tensor token_embd.weight has shape (300, 64)"),
        ("llama.feed_forward_length", 1 << 31, "llama.feed_forward_length is 2147483648"),
        ("tokenizer.ggml.eos_token_id", 300, "tokenizer.ggml.eos_token_id is 300, which is none of its 300 tokens"),
    ],
)
def test_sizes_that_do_not_match(
    key: str, value: int, words: str, file: Path, sound: bytes, refused: Callable[..., str]
) -> None:
    at = sound.index(key.encode()) + len(key) + 4
    assert words in refused(edited(file, at, value.to_bytes(4, "little")))


@WEIGHTS
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("block_count", 131, "it states 131 layers and 30 tensors; fetch it again"),
        ("embedding_length", 1 << 17, "tensor token_embd.weight has shape (300, 64), not (300, 131072)"),
        ("feed_forward_length", 1 << 24, "has shape (128, 64), not (16777216, 64)"),
    ],
)
def test_no_model_is_made_of_damaged_sizes(
    key: str, value: int, words: str, options: tuple[str, ...], file: Path, sound: bytes, refused: Callable[..., str]
) -> None:
    """Also not by a conversion, where transformers would take the memory first."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    at = sound.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    assert words in refused(edited(file, at, value.to_bytes(4, "little")), *options)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_GROWTH_BYTES


def test_counts_and_lengths_beyond_reason(file: Path, sound: bytes, refused: Callable[..., str]) -> None:
    """Nothing is allocated or looked for by a number that the file cannot mean."""
    tokens = sound.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    for at in (8, 16, tokens + 4, tokens + 12):  # tensors, keys, values of an array, bytes of a string
        for byte in (2, 3, 5):
            file.write_bytes(sound)
            assert "header ends early or makes no sense" in refused(edited(file, at + byte, b"\x7f"))
    nested = b"GGUF" + b"".join(number.to_bytes(size, "little") for number, size in ((3, 4), (0, 8), (1, 8), (1, 8)))
    file.write_bytes(nested + b"k" + (9).to_bytes(4, "little") + 3000 * ((9).to_bytes(4, "little") + b"\1" + bytes(7)))
    assert "header ends early or makes no sense" in refused(file)


def test_missing_and_unused_tensors(
    tmp_path: Path, refused: Callable[..., str], run: Callable[..., tuple[int, str]]
) -> None:
    model = tiny_model("llama", vocab_size=300)
    missing = write_model(tmp_path / "a.gguf", model, Q8_0, without="model.layers.1.mlp.up_proj.weight")
    assert "its weights lack 1 tensor: model.layers.1.mlp.up_proj.weight; the file is incomplete" in refused(missing)
    headless = write_model(tmp_path / "b.gguf", model, Q8_0, without="model.embed_tokens.weight")
    assert "the GGUF file lacks token_embd.weight; it is incomplete: fetch it again" in refused(headless)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.odd.weight", np.zeros(4, np.float32))

    code, said = run(write_model(tmp_path / "c.gguf", model, Q8_0, add=add))
    assert code == 0 and "1 tensor of its weights not used: blk.0.odd.weight" in said


def test_parts_that_are_missing_or_of_other_files(tmp_path: Path, refused: Callable[..., str]) -> None:
    for name, layers in (("one", 3), ("two", 4)):
        (tmp_path / name).mkdir()
        model = tiny_model("llama", vocab_size=300, num_hidden_layers=layers)
        write_model(tmp_path / name / "t.gguf", model, Q8_0, split_max_tensors=12)
    one, two = (sorted((tmp_path / name).glob("*.gguf")) for name in ("one", "two"))
    assert (len(one), len(two)) == (3, 4)
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(one[1].read_bytes())
    assert "it is one of 3 parts, which its name does not say; name the parts NAME-00001-of-00003.gguf" in refused(
        alone
    )
    aside = one[1].rename(tmp_path / "aside")
    assert f"missing of its 3 parts: {one[1].name}; fetch the missing parts into the same folder" in refused(one[0])
    one[1].write_bytes(two[1].read_bytes())
    assert "its 3 parts do not belong together: t-00002-of-00003.gguf is one of 4 parts; fetch all" in refused(one[0])
    one[1].write_bytes(one[2].read_bytes())
    assert "t-00002-of-00003.gguf has another number (2, from 0 on)" in refused(one[0])
    write_model(tmp_path / "one" / "t.gguf", tiny_model("llama", vocab_size=300), Q8_0, split_max_tensors=11)
    aside.rename(one[1])  # of the same model, split after other tensors
    assert "its 3 parts do not belong together: " in refused(one[0])


def test_not_enough_memory(file: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvswap.models.loading.available_bytes", lambda: 1 << 16)
    monkeypatch.setattr("kvswap.models.gguf.available_bytes", lambda: 1 << 16)
    assert "64.0 KiB of memory are free; leave --no-mmap out" in refused(file, "--no-mmap")
    line = refused(file, "--weights", "float")
    assert "of memory, 64.0 KiB are free; close other programs, or take a smaller model" in line
    monkeypatch.setattr("kvswap.models.loading.available_bytes", lambda: 1 << 40)
    monkeypatch.setattr("kvswap.core.prompt_memory.available_bytes", lambda: 1 << 10)
    assert "1.0 KiB of memory are free; close other programs, shorten the context" in refused(file)


# ---- anything in the header is wrong


def flips(run: Callable[..., tuple[int, str]], file: Path, sound: bytes, cases: int) -> None:
    """Flip one bit of the header. In memory, because a cache on disk would be calibrated for every configuration."""
    tokens, types = sound.index(b"tokenizer.ggml.tokens") + 60, sound.index(b"tokenizer.ggml.token_type")
    tensors, end = entry(sound, FIRST_TENSOR), entry(sound, LAST_TENSOR) + ENTRY_BYTES
    spans = [(0, tokens), (tokens, types), (types, tensors), (tensors, end)]  # the words themselves matter less
    places = st.one_of(st.integers(8 * first, 8 * last - 1) for first, last in (*spans, spans[0], spans[3]))
    codes: set[int] = set()

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), derandomize=cases < 100)
    @given(places)
    @example(8 * (sound.index(b"llama.attention.head_count") + 26 + 4))  # transformers refuses 5 heads in its own way
    def any_bit(place: int) -> None:
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, said = run(file, "--method", "full")
        codes.add(code)
        if code != 0:
            check_refused(code, "\n".join(line for line in said.splitlines() if not line.startswith("note: ")))
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_GROWTH_BYTES

    any_bit()
    assert codes == {0, 2}


def test_any_bit_of_the_header(run: Callable[..., tuple[int, str]], file: Path, sound: bytes) -> None:
    run(file)  # what the first run loads is no growth of a later one
    flips(run, file, sound, 25)


@pytest.mark.slow
def test_any_bit_of_the_header_2000_times(run: Callable[..., tuple[int, str]], file: Path, sound: bytes) -> None:
    run(file)
    flips(run, file, sound, 2_000)
