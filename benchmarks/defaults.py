"""Compare the default parameters with alternatives, from the quality tables of several models.

    python benchmarks/defaults.py [--model ~/models/a --model ~/models/b]

With ``--model`` it first reads the model's tables from the cache of ``kvswap tune`` and writes their qualities to
``results/tables-NAME.json``. Then it prints the table of docs/settings.md from all these files. No model decodes here.

A value is the KL to full attention on calibration text relative to the defaults, as the geometric mean over texts and
contexts. Each alternative differs from the defaults in one parameter. The last lines say how much such ratios differ
between two halves of the texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvswap.config import Config
from kvswap.models.adapter import inspect
from kvswap.models.loading import load_model
from kvswap.tuning.measure_model import model_facts
from kvswap.tuning.tables import GROUPS, cached_tables, load_tables

RESULTS = Path(__file__).parent / "results"
KEY = ("tokens", "rank", "bits", "group_tokens", "select_tokens", "by_layer")
Choice = Callable[[dict[str, Any]], bool]


def ratio(facts: dict[str, Any], choice: Choice, than: Choice) -> float:
    """Return KL of ``choice`` / KL of ``than``, as the geometric mean over all places where both were measured."""

    def kl(matches: Choice) -> dict[tuple[int, int, int], float]:
        found = [each for each in facts["qualities"] if matches(each)]
        return {
            (each["tokens"], each["group_tokens"] if free else 0, text): kl
            for each in found
            for text, kl in enumerate(each["kl_by_text"])
        }

    sizes = {each["group_tokens"] for each in facts["qualities"] if choice(each)}
    free = len(sizes) > 1
    ours, others = kl(choice), kl(than)
    logs = [math.log(ours[key] / others[key]) for key in ours.keys() & others.keys()]
    return math.exp(sum(logs) / len(logs))


def setting(facts: dict[str, Any], **changes: Any) -> Choice:
    """Match the default setting with changes; None matches any value.

    The default is a sketch of D/8 x 2 bytes in 4 bit, M = 400, and the same number of groups in every layer.
    """
    first = facts["qualities"][0]
    values = {"rank": first["rank"], "bits": first["bits"], "select_tokens": 400, "by_layer": False, **changes}
    return lambda each: all(value is None or each[name] == value for name, value in values.items())


def comparisons(facts: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of KL to the defaults' for each alternative, by its name in the table."""
    rank = facts["qualities"][0]["rank"]
    found = {
        f"G = {group}": ratio(facts, setting(facts, group_tokens=group), setting(facts, group_tokens=4))
        for group in GROUPS
    }
    selected = sorted({each["select_tokens"] for each in facts["qualities"]})  # older tables have fewer
    found |= {
        f"M = {select}": ratio(facts, setting(facts, select_tokens=select), setting(facts)) for select in selected
    }
    for name, part, bits in (
        ("twice the bytes", 2 * rank, 4),
        ("the same bytes in 2 bit", 2 * rank, 2),
        ("half the bytes", rank // 2, 4),
        ("half the bytes in 2 bit", rank, 2),
        ("a quarter", rank // 4, 4),
        ("a quarter in 2 bit", rank // 2, 2),
    ):
        found[f"sketch: {name}"] = ratio(facts, setting(facts, rank=part, bits=bits), setting(facts))
    found["budgets by layer"] = ratio(facts, setting(facts, by_layer=True), setting(facts))
    return found


def unsteadiness(facts: dict[str, Any]) -> tuple[float, float]:
    """Return how much the ratio of a setting's KL to the default's differs between two halves of the texts.

    Two standard deviations of the difference of log ratios, over all settings and all ways to halve the texts: for the
    ratio of mean KLs, and for the geometric mean of the texts' own ratios. The tuner uses the latter.
    """
    kl = {tuple(each[name] for name in KEY): np.array(each["kl_by_text"]) for each in facts["qualities"]}
    first = facts["qualities"][0]
    plain, paired = [], []
    for key, values in kl.items():
        base = kl[key[0], first["rank"], first["bits"], Config().group_tokens, 400, False]
        if values is base:
            continue
        for chosen in itertools.combinations(range(1, facts["texts"]), facts["texts"] // 2):
            half = np.isin(np.arange(facts["texts"]), chosen)
            means = [math.log(values[each].mean() / base[each].mean()) for each in (half, ~half)]
            logs = [float(np.log(values[each] / base[each]).mean()) for each in (half, ~half)]
            plain.append(means[0] - means[1])
            paired.append(logs[0] - logs[1])
    return float(np.std(plain)), float(np.std(paired))


def load_results() -> list[dict[str, Any]]:
    """Return the committed tables in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("tables-*.json"))]


def markdown(models: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table with one row for each alternative and one column for each model."""
    names = [each["model"] for each in models]
    columns = [comparisons(each) for each in models]
    lines = [f"| changed | {' | '.join(names)} | mean |", f"|---|{'---|' * (len(names) + 1)}"]
    for key in columns[0]:
        values = [column[key] for column in columns]
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"| {key} | {' | '.join(f'{value:.2f}' for value in values)} | {mean:.2f} |")
    return lines


def main() -> None:
    """Parse the command line, write tables, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="read this model's cached tables first")
    for name in parser.parse_args().model:
        loaded = load_model(name)
        facts = model_facts(loaded, inspect(loaded.model))
        tables = load_tables(cached_tables(facts.fingerprint), facts.fingerprint, facts.layers)
        short = facts.name.rsplit("/", 1)[-1]
        values = {**dataclasses.asdict(tables.facts), "model": short}
        lines = ",\n".join(json.dumps(each) for each in values.pop("qualities"))
        head = json.dumps(values)[:-1]
        (RESULTS / f"tables-{short}.json").write_text(f'{head}, "qualities": [\n{lines}\n]}}\n')
    models = load_results()
    print("\n".join(markdown(models)))
    for facts in models:
        plain, paired = unsteadiness(facts)
        print(f"{facts['model']}: ratios from half the texts differ by {plain:.2f} (means), {paired:.2f} (by text)")


if __name__ == "__main__":
    main()
