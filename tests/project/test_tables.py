"""Tables in README and docs are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.tables import RESULTS, ROOT, SHORT_MARK, pages, results_of, update_page
from kvswap.lab.tables import MARK, update_tables

PAGES = [page.relative_to(ROOT).as_posix() for page in pages()]


def test_pages_with_tables_are_found() -> None:
    assert set(PAGES) >= {"README.md", "docs/benchmarks.md", "docs/benchmark-tables.md", "docs/quality.md"}


@pytest.mark.parametrize("name", PAGES)
def test_tables_of_the_docs_are_current(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert len(MARK.findall(page)) + len(SHORT_MARK.findall(page)) >= 1
    assert update_page(page, RESULTS) == page, "run: make tables"


def test_every_mark_is_seen() -> None:
    """A mark that is misspelt would leave a table that nothing holds to its results."""
    for name in ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))):
        page = (ROOT / name).read_text(encoding="utf-8")
        marks = len(MARK.findall(page)) + len(SHORT_MARK.findall(page))
        assert page.count("<!-- end -->") == marks and page.count(".json -->") == marks, name


@pytest.mark.parametrize("kind", ["bench", "resume", "scale", "quality"])
def test_no_result_is_left_out(kind: str) -> None:
    shown = {name for page in PAGES for name in results_of((ROOT / page).read_text(encoding="utf-8"))}
    there = {path.name for path in RESULTS.glob(f"{kind}*.json")}
    assert there and there <= shown


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/benchmark-tables.md"])
def test_a_changed_result_changes_the_page(name: str, tmp_path: Path) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    for file in set(results_of(page)):
        content = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        keys = ("median_step_s", "decode_speed_of_full", "decode_tokens_per_s", "resume_s")
        for row in [content["summary"]] if "summary" in content else content["results"]:
            for key in keys:
                if key in row:
                    row[key] *= 2
        (tmp_path / file).write_text(json.dumps(content))
    changed = update_page(page, tmp_path)
    for before, after in zip(tables(page), tables(changed), strict=True):
        assert before != after
    assert update_page(changed, RESULTS) == page


def tables(page: str) -> list[str]:
    """The text of every table made from results."""
    return [match[0] for mark in (MARK, SHORT_MARK) for match in mark.finditer(page)]


def test_text_around_the_tables_stays(tmp_path: Path) -> None:
    for update in (update_tables, update_page):
        assert update("# A page\n\nwithout tables\n", tmp_path) == "# A page\n\nwithout tables\n"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_folder_of_a_machine(path: Path) -> None:
    """A cloner does not have it, and it tells who measured."""
    assert not re.search(r'"/(root|home|Users|work)/', path.read_text(encoding="utf-8"))
