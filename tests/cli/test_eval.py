"""``kvswap eval``: a table on stdout, every sample in the results file, which is continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvswap.cli.main import run_command
from tests.cli.test_run import changed, refused

pytestmark = pytest.mark.usefixtures("cache_home")
METHODS = "full,kvswap,window"


@pytest.fixture
def base(tiny, tmp_path) -> list[str]:
    """A valid command."""
    words = ["eval", "--model", tiny, "--methods", METHODS, "--context", "700,900", "--samples", "2", "--steps", "6"]
    words += ["--task", "agreement,perplexity", "--kv-memory", "3MiB", "--json", tmp_path / "results.json"]
    return [str(word) for word in [*words, "--kv-dir", tmp_path / "kv"]]


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "results.json").read_text())


def test_table_and_results(base, tmp_path, capfd):
    assert run_command(base) == 0
    out, err = capfd.readouterr()
    found = results(tmp_path)
    rows = {(row["task"], row["method"], row["context"]): row for row in found["results"]}
    assert len(rows) == len(found["results"]) == 2 * 3 * 2
    assert len(out.splitlines()) == 1 + len(rows)
    assert "evaluating: 100%" in err and err.count("only 2 samples") == 1
    for (task, method, _), row in rows.items():
        keys = {"score", "full_score", "retention", "stderr", "n", "kl", "kv_memory_limit_bytes"}
        assert keys <= row.keys() and row["n"] == 2 and row["note"]
        assert row["kv_memory_limit_bytes"] == (None if method == "full" else 3 << 20)
        assert row["kl"] == pytest.approx(0, abs=1e-9) if method == "full" else row["kl"] > 0
        if (task, method) == ("agreement", "full"):
            assert row["score"] == row["retention"] == 1
    for sample in found["samples"]:
        assert len(sample["prompt_hash"]) == 16 and sample["prompt_tokens"] == sample["context"]
        assert 0 <= sample["score"] <= 1
        assert sample["mass"] == 1 if sample["method"] == "full" else 0.05 < sample["mass"] < 1
    assert len({sample["prompt_hash"] for sample in found["samples"]}) == 4


def test_a_second_run_continues_the_file(base, tmp_path, capfd):
    one = changed(base, samples=1, context="700", methods="kvswap")
    assert run_command(one) == 0
    before = results(tmp_path)["samples"]
    assert run_command(changed(base, samples=1, context="700")) == 0
    after = results(tmp_path)["samples"]
    assert after[: len(before)] == before and len(after) > len(before)
    assert {row["method"] for row in results(tmp_path)["results"]} == set(METHODS.split(","))
    assert all(row["n"] == 1 and row["stderr"] is None for row in results(tmp_path)["results"])
    stamp = (tmp_path / "results.json").stat().st_mtime_ns
    assert run_command(changed(base, samples=1, context="700")) == 0
    assert (tmp_path / "results.json").stat().st_mtime_ns == stamp
    assert "its seed, text_sha256 differ" in refused(capfd, changed(one, seed=3))


def test_several_sketch_settings_in_one_run(base, tmp_path, capfd):
    words = changed(base, task="agreement", samples=1, context="900", methods="kvswap,kvswap-paper")
    assert run_command([*words, "--setting", "relaxed,tight:8"]) == 0
    rows = {(row["method"], row["setting"]): row for row in results(tmp_path)["results"]}
    assert len(rows) == 5 and rows["full", None]["sketch"] == "none"
    for method in ("kvswap", "kvswap-paper"):
        relaxed, tight = (rows[method, setting]["sketch"] for setting in ("relaxed", "tight:8"))
        ranks = [int(label.split("rank ")[1].split(",")[0]) for label in (relaxed, tight)]
        assert ranks[0] > ranks[1]
    assert "tight:8" in capfd.readouterr().out
    assert "use relaxed or tight" in refused(capfd, [*words, "--setting", "loose"])
    assert "use relaxed or tight" in refused(capfd, [*words, "--setting", "tight:x"])


def test_results_are_of_one_kind_of_weights(base, tmp_path, capfd):
    words = changed(base, task="agreement", samples=1, context="700", methods="window")
    assert run_command([*words, "--weights", "q8", "--no-mmap"]) == 0
    assert results(tmp_path)["identity"]["weights"] == "q8"
    assert "its weights differ" in refused(capfd, words)


def test_stops_after_a_time_and_continues(base, tmp_path, capfd):
    words = changed(base, task="agreement", methods="kvswap", context="700", samples=3)
    assert run_command([*words, "--minutes", "0"]) == 0
    assert "2 samples are left" in capfd.readouterr().err
    assert {sample["index"] for sample in results(tmp_path)["samples"]} == {0}
    assert run_command(words) == 0
    assert {sample["index"] for sample in results(tmp_path)["samples"]} == {0, 1, 2}


def test_mistakes(base, tmp_path, capfd):
    assert "use one of agreement, perplexity, needle" in refused(capfd, changed(base, task="agreement,chess"))
    assert "use one of" in refused(capfd, changed(base, methods="full,magic"))
    assert "the model's limit is 2,048" in refused(capfd, changed(base, context="2045"))
    assert "context 90,000, the model's limit is 2,048" in refused(capfd, changed(base, context="700,90000"))
    assert "'many'" in refused(capfd, changed(base, context="many"))
    assert "kv_memory" in refused(capfd, changed(base, kv_memory="many"))
    assert "no such file" in refused(capfd, [*base, "--document", "nowhere.txt"])
    (tmp_path / "results.json").write_text("[]")
    assert "not a results file" in refused(capfd, base)


def test_questions_a_plot_and_stored_prompts(base, tmp_path, capfd):
    folder = tmp_path / "prompts"
    words = changed(base, task="needle", samples=2, context="1500", methods="full", prompts=folder)
    assert run_command([*words, "--plot", str(tmp_path / "grid.png")]) == 0
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 2 and (tmp_path / "grid.png").stat().st_size > 5000
    assert run_command(changed(words, methods="kvswap")) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    first = next(iter(files))
    first.write_bytes(b"damaged")
    again = changed(words, methods="kvswap", json=tmp_path / "again.json")
    assert run_command(again) == 0 and first.stat().st_size > 5000
    found = [json.loads((tmp_path / name).read_text())["samples"] for name in ("results.json", "again.json")]
    assert {each.get("depth") for each in found[0] if each["task"] == "needle"} == {0.0, 0.25}
    for each in found[0]:
        twin = next(s for s in found[1] if (s["prompt_hash"], s["method"]) == (each["prompt_hash"], each["method"]))
        assert twin["answer"] == each["answer"] and isinstance(each["answer"], str)
        assert twin["nll"] == pytest.approx(each["nll"], abs=1e-4)
    capfd.readouterr()


def test_mistakes_in_plots_and_datasets(base, tmp_path, capfd):
    assert "unknown kind of picture" in refused(capfd, changed(base, plot=tmp_path / "x.txt"))
    (tmp_path / "data.jsonl").write_text('{"input": 1}\n')
    bad = changed(base, task="longbench", dataset=tmp_path / "data.jsonl")
    assert "line 1: 'input' is missing" in refused(capfd, bad)
    assert "--dataset" in refused(capfd, changed(base, task="longbench"))


def test_texts_are_asked_every_question_and_what_it_takes_is_said_first(base, tmp_path, capfd):
    (tmp_path / "mine.txt").write_text("".join(f"Line {n} says that {n} is not {n + 1}. " for n in range(400)))
    words = changed(base, task="facts-all,facts-values", context="2000", methods="full", samples=None)
    words += ["--texts", "1", "--document", str(tmp_path / "mine.txt")]
    assert "the model's limit is 2,048; use a context of at most" in refused(capfd, words)
    words = changed(words, task="ruler-mk1", context="1200")
    assert run_command(words) == 0
    out, err = capfd.readouterr()
    found = results(tmp_path)
    assert "4 samples to measure" in err and err.index("4 samples to measure") < err.index("evaluating: ")
    assert "left\n" in err and "of disk\n" in err
    assert out.splitlines()[0].split().count("error") == 3
    assert found["identity"]["text_kind"] == "documents" and found["identity"]["documents"] == ["mine.txt"]
    assert {row["text_kind"] for row in found["results"]} == {"documents"}
    assert {(row["n"], row["texts"]) for row in found["results"]} == {(4, 1)}
    other = changed(base, task="ruler-mk1", context="1200", methods="full")
    assert "its text_kind, documents, text_sha256 differ" in refused(capfd, other)


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_continues(base, tmp_path, capfd, monkeypatch):
    from kvswap.lab.evals import run

    measured: list[int] = []

    def measure(*args, **values):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(1)
        return whole(*args, **values)

    whole = run.measure
    words = changed(base, task="agreement", methods="window", context="700", samples=3)
    monkeypatch.setattr(run, "measure", measure)
    assert run_command(words) == 130
    assert "1 of 3 samples were measured: run the same command again" in capfd.readouterr().err
    monkeypatch.setattr(run, "measure", whole)
    before = results(tmp_path)["samples"]
    assert {each["index"] for each in before} == {0}
    assert run_command(words) == 0
    assert "2 samples to measure" in capfd.readouterr().err
    after = results(tmp_path)["samples"]
    assert after[: len(before)] == before and {each["index"] for each in after} == {0, 1, 2}
