"""``kvswap bench``: all methods interleaved, a results file that is continued, a table, a plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

import kvswap.lab.bench.run
from kvswap.cli.main import run_command
from kvswap.lab.rivals.registry import DISK, NAMES

pytestmark = pytest.mark.usefixtures("cache_home")
KEYS = {
    *("method", "batch", "context", "decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "kl", "top1"),
    *("kv_memory_peak_bytes", "kv_full_bytes", "read_bytes_per_token", "exposed_wait_fraction", "reuse_rate"),
}


@pytest.fixture(autouse=True)
def _quick_disk_test(monkeypatch) -> None:
    measure = kvswap.lab.bench.run.measure_reads
    monkeypatch.setattr(
        kvswap.lab.bench.run, "measure_reads", lambda backend: measure(backend, file_bytes=1 << 20, read_s=0.1)
    )


@pytest.fixture
def base(tiny, tmp_path) -> list[str]:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"select_tokens": 100, "recent_tokens": 16, "kv_memory": "4MiB"}))
    words = ["bench", "--model", tiny, "--context", "300", "--new-tokens", "3", "--repeat", "2", "--config", config]
    return [str(word) for word in [*words, "--kv-dir", tmp_path / "kv", "--json", tmp_path / "bench.json"]]


@pytest.mark.usefixtures("groups_are_read")
def test_all_methods(base, tmp_path, capfd):
    picture = tmp_path / "bench.png"
    assert run_command([*base, "--methods", "all", "--batch", "1,2", "--plot", str(picture), "--label", "a test"]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    rows = content["results"]
    assert {(row["method"], row["batch"]) for row in rows} == {(name, batch) for name in NAMES for batch in (1, 2)}
    for row in rows:
        assert set(row) >= KEYS
        low, high = row["spread"]["decode_tokens_per_s"]
        assert 0 < low <= row["decode_tokens_per_s"] <= high
        assert row["ttft_s"] > 0 and row["turns"] == 2
        assert (row["kl"] < 1e-5) == (row["method"] in ("full", "mmap", "reload"))
        assert (row["read_bytes_per_token"] > 0) == (row["method"] in DISK and row["method"] != "window")
        if row["method"] in DISK:
            assert row["kv_memory_peak_bytes"] <= row["kv_memory_limit_bytes"] == 4 << 20
    whole = [row["read_bytes_per_token"] for row in rows if row["method"] == "reload"]
    assert all(size >= 0.7 * 3 * 300 * 2 * 32 * 2 for size in whole)
    assert picture.stat().st_size > 10_000
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * len(NAMES) and "kvswap-paper" in "".join(lines)
    assert content["identity"]["label"] == "a test"
    assert content["environment"][0]["read_test"]["small"]["bytes_per_s"] > 0


def test_existing_results_are_not_measured_again(base, tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    assert run_command([*base, "--methods", "window"]) == 0
    before = json.loads(file.read_text())["records"]
    assert [record["method"] for record in before] == ["full", "window"]
    assert run_command([*base, "--methods", "window,kvswap", "--context", "200,300"]) == 0
    after = json.loads(file.read_text())["records"]
    assert [(r["context"], r["method"]) for r in after[2:]] == [
        (200, "full"), (200, "window"), (200, "kvswap"), (300, "kvswap"),
    ]  # fmt: skip
    assert after[:2] == before
    assert after[-1]["full_step_s"] != before[0]["full_step_s"]  # compared with full in the same run
    monkeypatch.setattr(kvswap.lab.bench.run, "attach_each", None)
    assert run_command([*base, "--methods", "window,kvswap", "--context", "200,300"]) == 0


def test_results_are_of_one_kind_of_weights(base, tmp_path, capfd):
    file = tmp_path / "bench.json"
    words = [*base, "--methods", "window", "--weights", "q8", "--no-mmap"]
    assert run_command(words) == 0
    assert json.loads(file.read_text())["identity"]["weights"] == "q8"
    assert run_command([*base, "--methods", "window"]) == 2
    assert "its weights differ" in capfd.readouterr().err
    content = json.loads(file.read_text())
    del content["identity"]["weights"]  # as in files of before, whose weights were those of auto
    file.write_text(json.dumps(content))
    assert run_command([*base, "--methods", "window"]) == 0
    assert run_command(words) == 2
    for option in (["--weights", "q8"], ["--no-mmap"], ["--dtype", "bfloat16"]):
        assert run_command([*base, "--peers", "llama.cpp", *option]) == 2
        assert "--peers with --dtype, --weights or --no-mmap" in capfd.readouterr().err


def test_interrupted_and_continued(base, tmp_path, monkeypatch):
    run_interleaved = kvswap.lab.bench.run.run_interleaved

    def once(*args, **kwargs):
        monkeypatch.setattr(kvswap.lab.bench.run, "run_interleaved", broken)
        return run_interleaved(*args, **kwargs)

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(kvswap.lab.bench.run, "run_interleaved", once)
    words = [*base, "--prompts", "2", "--share-prompt", "--methods", "kvswap,mmap,reload"]
    assert run_command(words) == 130
    assert len(json.loads((tmp_path / "bench.json").read_text())["records"]) == 4
    monkeypatch.setattr(kvswap.lab.bench.run, "run_interleaved", run_interleaved)
    assert run_command(words) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [record["prompt"] for record in content["records"]] == [0] * 4 + [1] * 4
    full, ours, *exact = content["results"]
    assert [row["kl"] < 1e-6 for row in exact] == [True, True]
    assert (full["turns"], full["prompts"]) == (4, 2) and ours["ttft_s"] is None and full["ttft_s"] > 0
    rates = [3 / sum(turn["step_s"]) for record in content["records"][1::4] for turn in record["turns"]]
    assert ours["decode_tokens_per_s"] == pytest.approx(statistics.median(rates))


def test_a_method_with_its_own_configuration(base, tmp_path, capfd):
    file, wide, picture = tmp_path / "bench.json", tmp_path / "wide.json", tmp_path / "bench.png"
    wide.write_text(json.dumps({"select_tokens": 200, "recent_tokens": 16, "kv_memory": "6MiB"}))
    assert run_command([*base, "--methods", "kvswap"]) == 0  # a file without variants goes on with one
    words = [*base, "--methods", f"kvswap,kvswap@{wide}", "--share-prompt", "--plot", str(picture)]
    assert run_command(words) == 2  # prompts are shared here and were not before
    words.remove("--share-prompt")
    capfd.readouterr()
    assert run_command(words) == 0
    assert [line.split()[2] for line in capfd.readouterr().out.splitlines()[1:]] == ["full", "kvswap", "kvswap@wide"]
    assert picture.stat().st_size > 10_000
    content = json.loads(file.read_text())
    assert [record["method"] for record in content["records"]] == ["full", "kvswap", "kvswap@wide"]
    _, ours, other = content["results"]
    assert ours["config"] is None and other["config"] == json.loads(wide.read_text())
    assert (ours["kv_memory_limit_bytes"], other["kv_memory_limit_bytes"]) == (4 << 20, 6 << 20)
    assert other["kl"] < ours["kl"]  # twice the tokens
    assert content["identity"]["variants"] == {"kvswap@wide": other["config"]}

    before = file.read_text()
    assert run_command([*words, "--kv-memory", "5MiB"]) == 2  # its limit is given, and is another
    wide.write_text(json.dumps({"select_tokens": 150}))
    assert run_command(words) == 2
    assert "its kvswap@wide had another configuration; rename" in capfd.readouterr().err
    assert file.read_text() == before
    assert run_command([*base, "--methods", "kvswap"]) == 0  # without the variant it goes on


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "kvswap@absent.json"], "--methods kvswap@absent.json: config file absent.json: "),
        (["--methods", "magic"], "method: got 'magic'; use one of kvswap, "),
        (["--context", "4k"], "--context: got '4k'; give whole numbers"),
        (["--batch", "0"], "--batch: got '0'"),
        (["--context", "9000"], "context 9,000: the model's limit is 2,048 tokens"),
        (["--document", "absent.txt"], "no such file"),
        (["--kv-memory", "64KiB"], "set kv_memory to at least"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: cannot be written"),
    ],
)
def test_mistakes_are_one_line_on_stderr(base, options, words, capfd):
    assert run_command([*base, *options]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and words in lines[0]


def test_results_of_another_benchmark_are_refused(base, tmp_path, capfd):
    assert run_command([*base, "--methods", "window"]) == 0
    assert run_command([*base, "--methods", "window", "--label", "other"]) == 2
    assert "its label differ" in capfd.readouterr().err
    Path(tmp_path / "bench.json").write_text("{}")
    assert run_command(base) == 2
    assert "not a benchmark of this version" in capfd.readouterr().err
