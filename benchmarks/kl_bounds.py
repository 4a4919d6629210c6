"""Check the KL that the tuner predicts: do unseen texts stay below the bound?

    python benchmarks/kl_bounds.py

No model runs; everything comes from committed results. ``tables-NAME.json`` (measured on calibration text) gives the
expected KL and the bound of each setting. ``predictor-*.json`` gives the KL of evaluation texts, which were never
calibrated on. The script prints the table in docs/tuning.md.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.disk.json_files import build
from kvswap.tuning.tables import PredictedKL, SketchSize, Tables, TablesFacts

RESULTS = Path(__file__).parent / "results"
RUNS = {"smollm2-135m": "predictor-smollm2-7k.json", "qwen05": "predictor-qwen05-8k.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One setting of one model: the predicted KL, and the measured KL of each text."""

    model: str
    setting: str
    predicted: PredictedKL
    kl_by_text: list[float]

    @property
    def below(self) -> int:
        """Number of texts whose KL is at most the bound."""
        return sum(each <= self.predicted.bound for each in self.kl_by_text)


def committed_tables(name: str) -> Tables:
    """Return the tables of ``tables-NAME.json``. They have qualities only; rankings are not committed."""
    return Tables(build(TablesFacts, json.loads((RESULTS / f"tables-{name}.json").read_text()), name), {}, {})


def compare() -> Iterator[Comparison]:
    """Compare every setting of method ``kvswap`` in the runs."""
    for model, file in RUNS.items():
        tables, rows = committed_tables(model), json.loads((RESULTS / file).read_text())
        for name, first in rows[0]["methods"].items():
            if not name.startswith("kvswap "):
                continue
            rank, bits, group_tokens = _numbers(first, name)
            yield Comparison(
                model=model,
                setting=f"rank {rank} in {bits} bit, G = {group_tokens}",
                predicted=tables.kl(rows[0]["context"], SketchSize(rank, bits), group_tokens, 400, by_layer=False),
                kl_by_text=[statistics.fmean(row["methods"][name]["kl"]) for row in rows],
            )


def markdown(found: list[Comparison]) -> list[str]:
    """Lines of a Markdown table with one row for each setting."""
    lines = ["| model | setting | expected | measured | bound | texts below |", "|---|---|---|---|---|---|"]
    for each in found:
        measured = statistics.fmean(each.kl_by_text)
        lines.append(
            f"| {each.model} | {each.setting} | {each.predicted.expected:.4f} | {measured:.4f} "
            f"| {each.predicted.bound:.4f} | {each.below} of {len(each.kl_by_text)} |"
        )
    return lines


def _numbers(row: dict[str, Any], name: str) -> tuple[int, int, int]:
    """Rank, bits and G of a variant, from its sketch's label and its name."""
    sketch = re.fullmatch(r"transform rank (\d+), (\d+) bit", row["sketch"])
    group = re.search(r"G(\d+)$", name)
    assert sketch and group, (row["sketch"], name)
    return int(sketch[1]), int(sketch[2]), int(group[1])


def main() -> None:
    """Print the table."""
    print("\n".join(markdown(list(compare()))))


if __name__ == "__main__":
    main()
