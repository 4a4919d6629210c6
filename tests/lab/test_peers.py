"""``kvswap bench --peers``: the same tokens to several programs, each in a process of its own."""

from __future__ import annotations

import io
import json
import sys

import pytest

from kvswap.cli.main import run_command
from kvswap.config import Config
from kvswap.errors import ConfigError, InputError, KVSwapError
from kvswap.lab.peers import report, run
from kvswap.lab.peers.worker import memory, serve

STAND_IN = """
import json, sys
name = sys.argv[1]
seen = []
for line in sys.stdin:
    request = json.loads(line)
    seen.append(request["do"])
    if request["do"] == "load":
        found = {"versions": {name: "1"}}
    elif request["do"] == "encode":
        found = {"tokens": list(range(100))}
    elif request["do"] == "prefill":
        if len(request["tokens"]) == 66:
            sys.exit("the stand-in broke")
        found = {"prefill_s": 2.0, "first": request["tokens"][0]}
    elif request["do"] == "steps":
        slow = 0.5 if name == "kvswap" else 1.0
        top = [token + (name != "kvswap" and token % 2) for token in request["tokens"]]
        found = {"step_s": [slow] * len(top), "top": top}
    else:
        found = {"anonymous_bytes": 1 << 20, "mapped_bytes": 2 << 20}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def plan() -> run.Plan:
    return run.Plan(peers=["llama.cpp"], contexts=[10, 20], new_tokens=4, repeat=3, threads=1)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Programs whose speed is known, in place of the real ones."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    popen = run.subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda command, **kw: popen([sys.executable, str(script), command[-1]], **kw)
    )
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    return file


def compare(file, plan, tmp_path):
    return run.compare(
        "m", file, Config(), plan, documents=[], file=tmp_path / "out.json", on_progress=lambda *counts: None
    )


def test_rows_tell_who_is_faster_by_how_much(stand_in, plan, tmp_path):
    rows = compare(stand_in, plan, tmp_path)
    assert [(row["context"], row["program"]) for row in rows] == [
        (context, name) for context in (10, 20) for name in ("kvswap", "llama.cpp")
    ]
    peer = rows[1]
    assert peer["decode_ratio"] == 2 and peer["decode_tokens_per_s"] == 1 and peer["same_next_token"] == 0.5
    assert rows[0]["prefill_tokens_per_s"] == 5 and rows[0]["anonymous_bytes"] == 1 << 20
    assert len(peer["step_s"]) == 3 and all(len(turn) == 4 for turn in peer["step_s"])
    lines = report.table(rows)
    assert len(lines) == 5 and "2.00 x" in lines[2] and "50%" in lines[2]
    content = json.loads((tmp_path / "out.json").read_text())
    assert "2.00 x" in "\n".join(report.markdown_lines(content))
    report.plot(rows, tmp_path / "out.png", "a title")
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_a_results_file_is_continued(stand_in, plan, tmp_path, monkeypatch):
    compare(stand_in, run.Plan(**{**run.asdict(plan), "contexts": [10]}), tmp_path)
    asked = []
    measure = run._measure

    def recorded(plan, context, *args, **options):
        asked.append(context)
        return measure(plan, context, *args, **options)

    monkeypatch.setattr(run, "_measure", recorded)
    assert len(compare(stand_in, plan, tmp_path)) == 4 and asked == [20]
    with pytest.raises(ConfigError, match="repeat"):
        compare(stand_in, run.Plan(**{**run.asdict(plan), "repeat": 2}), tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"peers": ["ollama"]}, ConfigError, "known peers: llama.cpp"),
        ({"peers": ["kvswap"]}, ConfigError, "known peers"),
        ({"contexts": [95]}, InputError, "there are 100"),
        ({"contexts": [66]}, KVSwapError, "the stand-in broke"),
    ],
)
def test_failures_are_one_line(stand_in, plan, tmp_path, change, error, text):
    with pytest.raises(error, match=text):
        compare(stand_in, run.Plan(**{**run.asdict(plan), **change}), tmp_path)


def test_the_worker_answers_errors_and_ends(tmp_path):
    answers = io.StringIO()
    load = {"do": "load", "model": str(tmp_path / "no.gguf"), "threads": 1, "context_tokens": 9, "config": {}}
    serve("kvswap", io.StringIO(json.dumps(load) + "\n" + json.dumps({"do": "memory"}) + "\n"), answers)
    (only,) = map(json.loads, answers.getvalue().splitlines())
    assert "no such file" in only["error"] and only["hint"]


def test_memory_of_a_process_is_told_apart():
    before = memory()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory()["anonymous_bytes"] - before["anonymous_bytes"] > 60 << 20
    assert memory()["mapped_bytes"] > 1 << 20


def test_kvswap_answers_in_a_process_of_its_own(tiny, tmp_path, cache_home):
    worker = run.Worker("kvswap")
    try:
        config = {"kv_dir": str(tmp_path / "kv"), "kv_memory": "4MiB", "select_tokens": 100}
        found = worker.ask("load", model=str(tiny), threads=1, context_tokens=300, config=config)
        assert set(found["versions"]) == {"kvswap", "torch", "transformers"}
        assert worker.ask("prefill", tokens=[5] * 280)["prefill_s"] > 0
        steps = worker.ask("steps", tokens=[6, 7, 8])
        assert len(steps["step_s"]) == len(steps["top"]) == 3
    finally:
        worker.close()


def test_the_command_needs_a_gguf_file(tiny, tmp_path, capfd):
    command = ["bench", "--model", str(tiny), "--peers", "llama.cpp", "--json", str(tmp_path / "x.json")]
    assert run_command(command) == 2
    assert "not a GGUF file" in capfd.readouterr().err
