"""The README says what the command says, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvswap
from kvswap.cli.run import run

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_option_table_is_complete_and_true() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| (.*?) \|", README, re.MULTILINE))
    assert list(rows) == [parameter.opts[0] for parameter in run.params]
    for parameter in run.params:
        stated = rows[parameter.opts[0]].strip("`")
        if isinstance(parameter.default, str | int | float) and not isinstance(parameter.default, bool):
            assert stated == str(parameter.default)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_python_runs(number, tiny, cache_home, tmp_path, monkeypatch, capsys) -> None:
    code = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[number]
    code = code.replace('"smollm2-135m"', repr(str(tiny))).replace('"path/to/model"', repr(str(tiny)))
    code = code.replace("A long text. ", "abc")
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("# Notes\n\nIt is decided to go on. " * 9)
    names = {"kvswap": kvswap} if number == 2 else {}
    exec(compile(code, f"README block {number}", "exec"), names)  # it is our own page
    assert capsys.readouterr().out.strip()
