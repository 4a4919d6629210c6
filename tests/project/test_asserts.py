"""No ``assert`` guards anything: ``python -O`` leaves them out, so all they may do is tell a type checker a type."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "kvswap"


def narrows(test: ast.expr) -> bool:
    """Whether a condition only says that names are not None, or of a class: without it the next line fails as well."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        (operator, *more), last = test.ops, test.comparators[-1]
        return not more and isinstance(operator, ast.IsNot) and isinstance(last, ast.Constant) and last.value is None
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def guards(source: str) -> list[str]:
    """The asserts that check something; a message shows that somebody expected it to fail."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found if node.msg or not narrows(node.test)]


def test_no_assert_is_a_guard() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = [f"{path.relative_to(SOURCE)} {each}" for path in files for each in guards(path.read_text("utf-8"))]
    assert found == [], "raise an error instead, with what happened and what to do next"


@pytest.mark.parametrize(
    ("line", "guard"),
    [
        ("assert a.b is not None and c is not None", False),
        ("assert isinstance(a, B) and c is not None", False),
        ("assert a is None", True),
        ("assert a is not None, 'give a'", True),
        ("assert a is not None or b", True),
        ("assert isinstance(a, B) and a.count == 1", True),
        ("assert most <= width", True),
        ("assert not a", True),
        ("def f():\n    assert 0 < a is not None", True),
    ],
)
def test_guards_are_told_from_types(line: str, guard: bool) -> None:
    assert bool(guards(line)) == guard


SCRIPT = """
import json, sys, kvswap
with kvswap.load(sys.argv[1], kv_dir=sys.argv[2], kv_memory="3MiB", select_tokens=60, recent_tokens=16) as engine:
    for question in ("Who?", "And who not?"):
        list(engine.ask(question, [kvswap.Document(name="a.txt", text="Once upon a time. " * 20)], max_new_tokens=6))
    print(json.dumps([engine.stats.token_ids, engine.stats.text, not __debug__]))
"""


@pytest.mark.slow  # Python compiles all of PyTorch and transformers once more where it keeps no files of that
def test_the_same_tokens_without_asserts(tiny: Path, tmp_path: Path, cache_home: Path) -> None:
    found = []
    for options in ([], ["-O"]):
        words = [sys.executable, *options, "-c", SCRIPT, str(tiny), str(tmp_path / "kv")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    (tokens, text, optimised), (same_tokens, same_text, optimised_too) = found
    assert (optimised, optimised_too) == (False, True)
    assert len(tokens) == 6 and (tokens, text) == (same_tokens, same_text)
