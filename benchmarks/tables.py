"""Update the tables in docs/benchmarks.md and docs/evaluation.md from the files in benchmarks/results.

python benchmarks/tables.py          (or: make tables)
"""

from __future__ import annotations

from pathlib import Path

from kvswap.lab.tables import update_tables

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Rewrite the pages."""
    for name in ("benchmarks.md", "evaluation.md"):
        page = ROOT / "docs" / name
        text = update_tables(page.read_text(encoding="utf-8"), ROOT / "benchmarks" / "results")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
