"""The tables in the docs are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvswap.lab.tables import MARK, update_tables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["benchmarks.md", "evaluation.md"])
def test_tables_of_the_docs_are_current(name: str) -> None:
    page = (ROOT / "docs" / name).read_text()
    assert len(MARK.findall(page)) >= 1
    assert update_tables(page, ROOT / "benchmarks" / "results") == page, "run: make tables"


def test_a_changed_result_changes_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for _, _, name, _ in MARK.findall(page):
        content = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        row = content["summary"] if "summary" in content else content["results"][0]
        key = next(each for each in ("median_step_s", "decode_tokens_per_s", "resume_s") if each in row)
        row[key] *= 2
        (tmp_path / name).write_text(json.dumps(content))
    assert update_tables(page, tmp_path) != page
    assert update_tables(update_tables(page, tmp_path), ROOT / "benchmarks" / "results") == page


def test_text_around_the_tables_stays(tmp_path: Path) -> None:
    assert update_tables("# A page\n\nwithout tables\n", tmp_path) == "# A page\n\nwithout tables\n"
