"""benchmarks/resume.py writes its results, they make its table, and nothing remains on the disk."""

from __future__ import annotations

import json
import sys

from benchmarks import resume
from kvswap.lab.tables import resume_lines
from tests.helpers.folders import save_tiny


def test_it_runs_and_its_table_is_made(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVSWAP_SESSION_KEY", "")  # the script sets its own
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=2048)
    target = tmp_path / "out.json"
    words = ["--model", model, "--tokens", 900, "--repeat", 2, "--turns", 2, "--steps", 3, "--kv-dir", tmp_path / "kv"]
    monkeypatch.setattr(sys, "argv", ["resume.py", *map(str, words), "--json", str(target)])
    resume.main()
    content = json.loads(target.read_text())
    assert json.loads(capsys.readouterr().out) == content["summary"]
    assert list((tmp_path / "kv").iterdir()) == []
    first, steps = content["first_tokens"], content["decode"]
    assert all(len(first[kind][name]) == 2 for kind in ("plain", "secret") for name in ("resume_s", "question_s"))
    assert all(len(turn) == 3 for kind in steps for turn in steps[kind]["step_s"])
    assert all(groups > 0 for kind in ("checksums", "encrypted") for groups in steps[kind]["unsealed_groups"])
    assert steps["unverified"]["unsealed_groups"] == [0, 0]
    assert content["forks"]["disk_bytes"] < 1 << 20
    lines = resume_lines(content)
    assert sum(line.startswith("| ") for line in lines) == 7
