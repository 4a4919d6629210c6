"""Whether texts keep the KL that the tuner promises: tables of calibration text beside runs over evaluation text.

    python benchmarks/promises.py

From committed results alone: what ``tables-NAME.json`` expects and promises of a setting, beside what the texts of
``predictor-*.json`` had, none of which was calibrated on. Prints the table of docs/tuning.md.
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
from kvswap.tuning.tables import Sketching, Tables, TablesFacts, TextKL

RESULTS = Path(__file__).parent / "results"
RUNS = {"smollm2-135m": "predictor-smollm2-7k.json", "qwen05": "predictor-qwen05-8k.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One setting of one model: what tables say, and KL by text."""

    model: str
    setting: str
    said: TextKL
    kl_by_text: list[float]

    @property
    def below(self) -> int:
        """Texts that stay below the promise."""
        return sum(each <= self.said.promised for each in self.kl_by_text)


def committed_tables(name: str) -> Tables:
    """The qualities of ``tables-NAME.json``; rankings are not committed."""
    return Tables(build(TablesFacts, json.loads((RESULTS / f"tables-{name}.json").read_text()), name), {}, {})


def compare() -> Iterator[Kept]:
    """Every setting of kvswap's in the runs."""
    for model, file in RUNS.items():
        tables, rows = committed_tables(model), json.loads((RESULTS / file).read_text())
        for name, first in rows[0]["methods"].items():
            if not name.startswith("kvswap "):
                continue
            rank, bits, group_tokens = _numbers(first, name)
            yield Kept(
                model=model,
                setting=f"rank {rank} in {bits} bit, G = {group_tokens}",
                said=tables.kl(rows[0]["context"], Sketching(rank, bits), group_tokens, 400, by_layer=False),
                kl_by_text=[statistics.fmean(row["methods"][name]["kl"]) for row in rows],
            )


def markdown(found: list[Kept]) -> list[str]:
    """One row for each setting."""
    lines = ["| model | setting | expected | measured | promised | texts below |", "|---|---|---|---|---|---|"]
    for each in found:
        measured = statistics.fmean(each.kl_by_text)
        lines.append(
            f"| {each.model} | {each.setting} | {each.said.expected:.4f} | {measured:.4f} | {each.said.promised:.4f} "
            f"| {each.below} of {len(each.kl_by_text)} |"
        )
    return lines


def _numbers(row: dict[str, Any], name: str) -> tuple[int, int, int]:
    """Rank, bits and G of a variant, from what its cache said and its name."""
    sketch = re.fullmatch(r"transform rank (\d+), (\d+) bit", row["sketch"])
    group = re.search(r"G(\d+)$", name)
    assert sketch and group, (row["sketch"], name)
    return int(sketch[1]), int(sketch[2]), int(group[1])


def main() -> None:
    """Command line."""
    print("\n".join(markdown(list(compare()))))


if __name__ == "__main__":
    main()
