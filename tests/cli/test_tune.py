"""``kvswap tune``: a file that ``kvswap run`` takes, with reasons and a prediction; its memory is exact."""

from __future__ import annotations

import functools
import json
import os

import pytest

from kvswap.cli.main import run_command
from kvswap.lab import verify
from kvswap.tuning import measure_disk as disk_costs
from kvswap.tuning import measure_tables, profile
from kvswap.tuning import tune as tune_module
from kvswap.tuning.solution import load_tuned
from kvswap.units import MIB
from tests.helpers.folders import save_tiny

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure everything in seconds."""
    measure = functools.partial(disk_costs.measure_disk, point_s=0.001, file_bytes=16 * MIB)
    monkeypatch.setattr(profile, "measure_disk", measure)
    tables = functools.partial(measure_tables.measure_tables, contexts=(512, 1024), texts=2, steps=2)
    monkeypatch.setattr(tune_module, "measure_tables", tables)
    monkeypatch.setattr(verify, "STEPS", 10)


def words(tiny, tmp_path, *more: str, memory: str = "3MiB", context: int = 1500) -> list[str]:
    base = ["tune", "--model", str(tiny), "--kv-memory", memory, "--context", str(context)]
    return [*base, "--kv-dir", str(tmp_path / "kv"), "--out", str(tmp_path / "tuned.json"), *more]


def test_tuned_file_has_reasons_and_run_uses_it(tiny, tmp_path, capfd):
    tables = tmp_path / "tables.safetensors"
    more = ["--context", "600", "--tables", str(tables), "--verify", "--prefer", "speed"]
    assert run_command(words(tiny, tmp_path, *more)) == 0
    out = capfd.readouterr().out
    for text in ("1 x 1,500 tokens", "1 x 600 tokens", "sketch: rank", "G = ", "M ", "reuse:", "disk:", "expected:"):
        assert text in out, text
    assert "  memory: " in out and "KL, 9 of 10 texts below" in out and "KL, mean over texts" in out
    tuned = load_tuned(tmp_path / "tuned.json")
    for each in tuned.solutions:
        prediction = each.prediction
        assert prediction.kl_bound > prediction.expected_kl > 0
        assert f"KL to full attention {prediction.expected_kl:.4f} expected in the mean over texts" in out
        assert f"9 of 10 texts are expected to stay below {prediction.kl_bound:.4f}" in out
    assert [each.context_tokens for each in tuned.solutions] == [1500, 600] and tables.exists()

    document, stats = tmp_path / "story.txt", tmp_path / "stats.json"
    document.write_text("Once upon a time. " * 60)
    run = ["run", "--model", str(tiny), "--config", str(tmp_path / "tuned.json"), "--document", str(document)]
    run += ["--ask", "Who?", "--max-new-tokens", "3", "--stats-json", str(stats)]
    assert run_command(run) == 0
    numbers, values = json.loads(stats.read_text()), tuned.solutions[0].values  # the prompt is longer than 600
    for key in ("group_tokens", "sketch_rank", "sketch_bits", "layer_select_tokens"):
        assert numbers["config"][key] == values[key]
    assert numbers["kv_memory_limit_bytes"] == values["kv_memory"] <= 3 * MIB
    assert os.listdir(tmp_path / "kv") == []


def test_a_file_tuned_for_other_weights_is_refused(tiny, tmp_path, capfd):
    assert run_command([*words(tiny, tmp_path, context=600), "--weights", "q8"]) == 0
    run = ["run", "--model", str(tiny), "--config", str(tmp_path / "tuned.json"), "--ask", "Who?"]
    run += ["--max-new-tokens", "3", "--kv-dir", str(tmp_path / "kv")]
    assert run_command([*run, "--weights", "q8"]) == 0
    capfd.readouterr()
    assert run_command(run) == 2
    assert "another model" in capfd.readouterr().err


def test_memory_of_the_engine_is_what_was_predicted(tiny, tmp_path, capfd):
    assert run_command(words(tiny, tmp_path)) == 0
    tuned = load_tuned(tmp_path / "tuned.json")
    from kvswap.core.attach import attach
    from kvswap.models.loading import load_model
    from tests.helpers.families import forced_logits, tokens

    loaded, solution = load_model(str(tiny)), tuned.solutions[0]
    with attach(loaded.model, solution.config, tokenizer=loaded.tokenizer) as cache:
        forced_logits(loaded.model, tokens(1, 1500), tokens(1, 2), cache)
        assert cache.stats.memory_parts == solution.prediction.memory_parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "100KiB"}, "too small for 1 x 1,500 tokens whatever the parameters"),
        ({"memory": "much"}, "kv_memory: 'much' is not a size"),
        ({"context": 4096}, "more than the model's limit of 2,048"),
        ({"context": 0}, "context: got 0"),
        ({"more": ["--batch", "0"]}, "batch: got 0"),
        ({"more": ["--select-tokens", "20"]}, "select_tokens: 20 leaves no group"),
        ({"more": ["--out", "/nowhere/at/all.json"]}, "--out /nowhere/at/all.json: cannot be written"),
        ({"more": ["--profile", "absent.json"]}, "absent.json: No such file"),
        ({"more": ["--kv-dir", "/proc/nowhere"]}, "/proc/nowhere"),
        ({"more": ["--profile", __file__]}, "damaged JSON"),
        ({"more": ["--tables", __file__]}, "damaged"),
    ],
)
def test_mistakes_are_one_line_on_stderr(options, message, tiny, tmp_path, capfd):
    more = options.pop("more", [])
    assert run_command(words(tiny, tmp_path, *more, **options)) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and message in lines[0]


def test_too_little_calibration_text_is_an_error(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(measure_tables, "calibration_topics", lambda: [("one", "A short text. " * 50)])
    assert run_command(words(tiny, tmp_path, "--tables", str(tmp_path / "t.safetensors"))) == 2
    assert "the calibration text has" in capfd.readouterr().err
    assert not (tmp_path / "tuned.json").exists()


def test_files_of_another_model_are_refused(tiny, tmp_path, capfd):
    assert run_command(words(tiny, tmp_path, "--tables", str(tmp_path / "t.safetensors"))) == 0
    other = save_tiny(tmp_path / "other", "qwen2", max_position_embeddings=2048)
    assert run_command(words(other, tmp_path, "--tables", str(tmp_path / "t.safetensors"))) == 2
    assert "computed for model" in capfd.readouterr().err
    run = ["run", "--model", str(other), "--config", str(tmp_path / "tuned.json"), "--ask", "Who?"]
    assert run_command(run) == 2
    assert "tuned for another model" in capfd.readouterr().err


def test_files_of_another_machine_need_force(tiny, tmp_path, cache_home, capfd):
    profile_file, tables_file = tmp_path / "p.json", tmp_path / "t.safetensors"
    assert run_command(words(tiny, tmp_path, "--tables", str(tables_file))) == 0
    cached = max((cache_home / "kvswap" / "profiles").iterdir(), key=os.path.getmtime)
    values = json.loads(cached.read_text())
    profile_file.write_text(json.dumps({**values, "stamp": {**values["stamp"], "cpu": "Abacus"}}))
    more = ["--tables", str(tables_file), "--profile", str(profile_file)]
    capfd.readouterr()
    assert run_command(words(tiny, tmp_path, *more)) == 2
    assert "cpu Abacus instead of" in capfd.readouterr().err
    assert run_command(words(tiny, tmp_path, *more, "--force")) == 0
