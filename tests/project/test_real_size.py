"""benchmarks/real_size.py at a small size: both programs get the same context, and a program that ends is a result."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from benchmarks import real_size, tables
from kvswap.lab.peers import run
from kvswap.weights.gguf_file import TYPES

CONTEXT = 300
with_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
SMALL = real_size.Geometry(layers=8, hidden=256, heads=4, kv_heads=2, head_dim=64, inner=512, vocabulary=512)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The script at a small size, in a folder of its own; returns what it wrote."""
    monkeypatch.setattr(real_size, "LLAMA_31_8B", SMALL)
    monkeypatch.setenv("KVSWAP_HOME", "")  # the script sets its own

    def called(*words: str) -> dict:
        target = tmp_path / "out.json"
        arguments = ["--file", tmp_path / "small.gguf", "--context", CONTEXT, "--threads", 1, "--json", target, *words]
        monkeypatch.setattr(sys, "argv", ["real_size.py", *map(str, arguments)])
        real_size.main()
        return json.loads(target.read_text()) if target.exists() else {}

    return called


def test_types_are_those_of_the_format() -> None:
    """Of 8.03 billion weights; half of the layers have a better type for V and the way down, as in Q4_K_M."""
    sizes = {}
    for name, kind, shape in real_size._tensors(real_size.Geometry()):
        _, block, block_bytes = TYPES[kind]
        sizes[name] = kind, shape[-1] // block * block_bytes * (shape[0] if len(shape) > 1 else 1)
    assert sum(size for _, size in sizes.values()) == pytest.approx(4.91e9, rel=1e-3)
    assert sum(kind == real_size.Q6_K for name, (kind, _) in sizes.items() if "ffn_down" in name) == 16


def test_kvswap_is_measured_and_shown(call, tmp_path, capsys) -> None:
    call("--prepare")
    capsys.readouterr()
    content = call("--only", "kvswap", "--turns", "2", "--steps", "3")
    (row,) = content["results"]
    assert json.loads(capsys.readouterr().out) == row
    assert row["program"] == "kvswap" and row["outcome"] == "answers" and row["context"] == CONTEXT
    assert [len(turn) for turn in row["step_s"]] == [3, 3] and row["decode_tokens_per_s"] > 0
    assert row["stats"]["decode_steps"] == 1 + real_size.WARM_STEPS + 6
    assert row["stats"]["kv_full_bytes"] == (CONTEXT + 11) * SMALL.layers * 2 * SMALL.kv_heads * SMALL.head_dim * 2
    lines = tables.real_size_lines(content)
    assert lines[2].startswith(f"| none | {CONTEXT} | kvswap | {row['decode_tokens_per_s']:.2f} |")


def test_a_program_that_is_killed_is_a_result(call, monkeypatch) -> None:
    """It ends without a word, as under a memory limit of the kernel. The second run replaces the first result."""
    call("--prepare")
    ask = run.Worker.ask

    def killed(worker, do, **values):
        worker._process.kill()
        return ask(worker, do, **values)

    monkeypatch.setattr(run.Worker, "ask", killed)
    contents = [call("--only", "kvswap", "--turns", "1") for _ in range(2)]
    (row,) = contents[1]["results"]
    assert row["outcome"] == "ended" and "exit status -9" in row["how"] and row["step_s"] == []
    assert "decode_tokens_per_s" not in row
    assert "| ended |" in tables.real_size_lines(contents[1])[2]


def test_what_is_missing_is_named(call) -> None:
    with pytest.raises(SystemExit, match=r"small\.gguf is missing: run with --prepare first"):
        call("--only", "kvswap")


@with_llama_cpp
def test_both_programs_attend_to_the_same_context(call, tmp_path, monkeypatch) -> None:
    """The likeliest tokens are equal. With keys that are not in the order of pairs 2 of 20 were."""
    call("--prepare")
    file, ids, top = str(tmp_path / "small.gguf"), real_size.token_ids(CONTEXT + 16, SMALL.vocabulary), {}
    for name in real_size.PROGRAMS:
        worker = run.Worker(name)
        try:
            worker.ask("load", model=file, file=file, threads=1, context_tokens=CONTEXT + 16, config={})
            place = real_size.stored(tmp_path / "small", name, CONTEXT)
            worker.ask("resume", context=place.name if name == "kvswap" else str(place))
            top[name] = worker.ask("steps", tokens=ids[CONTEXT:])["top"]
        finally:
            worker.close()
    assert sum(a == b for a, b in zip(top["kvswap"], top["llama.cpp"], strict=True)) >= 14


@with_llama_cpp
def test_a_state_that_llama_cpp_does_not_read_is_an_error(call, tmp_path) -> None:
    call("--prepare")
    state = real_size.stored(tmp_path / "small", "llama.cpp", CONTEXT)
    state.write_bytes(state.read_bytes()[:1000])
    (row,) = call("--only", "llama.cpp", "--turns", "1")["results"]
    assert row["outcome"] == "ended" and "cannot load the state" in row["how"]


def test_a_program_that_is_too_slow_is_a_result(call, monkeypatch) -> None:
    call("--prepare")
    monkeypatch.setattr(run.Worker, "ask", lambda worker, do, **values: {"step_s": [1.0]} if do == "steps" else {})
    (row,) = call("--only", "llama.cpp", "--patience", "-1")["results"]
    assert row["outcome"] == "too slow" and row["first_step_s"] == 1.0 and row["step_s"] == []
