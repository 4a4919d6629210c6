"""The Python of README and docs runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvswap

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_has_the_blocks_that_run() -> None:
    assert [page for page in ("README.md", "docs/getting-started.md", "docs/sessions.md") if not blocks(page)] == []
    assert len(blocks("README.md")) == 3


@pytest.mark.parametrize(
    ("page", "number"),
    [("README.md", 0), ("README.md", 1), ("README.md", 2), ("docs/getting-started.md", 0), ("docs/sessions.md", 0)],
)
def test_python_runs(page, number, tiny, cache_home, tmp_path, monkeypatch, capsys) -> None:
    code = blocks(page)[number]
    code = code.replace('"smollm2-135m"', repr(str(tiny))).replace('"path/to/model"', repr(str(tiny)))
    code = code.replace("A long text. ", "abc")
    if 'Session.create("notes"' in code:  # two pages show the same names
        code = code.replace('"notes', f'"{Path(page).stem.lower()}-notes')
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("# Notes\n\nIt is decided to go on. " * 9)
    names = {} if "import kvswap" in code else {"kvswap": kvswap}
    exec(compile(code, f"{page}, block {number}", "exec"), names)  # it is our own page
    assert capsys.readouterr().out.strip()
