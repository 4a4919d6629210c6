"""Compare the tuned configuration with a sweep over all group sizes in the same memory.

    python benchmarks/tuner.py --model smollm2-135m --kv-memory 16MiB --context 4096 --profile p.json --json FILE

The sweep has G = 1, 2, 4, 8, 16 with the default sketch and M = 400 in every layer. All configurations and full
attention take the same tokens of evaluation text, interleaved within one process. A time is the median over texts; that
of one text is the median of the medians of five blocks of steps. KL is shown as expected (mean over texts), as the
bound that nine of ten texts are expected to stay below, and as measured.

Under ``benchmarks/throttle.py``, give a profile that was measured under it, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from kvswap import Config
from kvswap.lab.verify import Measured, measure_steps
from kvswap.models.adapter import inspect
from kvswap.models.loading import load_model
from kvswap.tuning.measure_model import model_facts
from kvswap.tuning.profile import load_profile
from kvswap.tuning.search import Pricing, Request
from kvswap.tuning.solution import Solution
from kvswap.tuning.tables import GROUPS, cached_tables, load_tables, sketch_sizes
from kvswap.tuning.tune import tune
from kvswap.units import parse_bytes


def sweep(pricing: Pricing, solution: Solution, limit_bytes: int) -> dict[str, Config]:
    """Return the tuned configuration and every group size that fits the limit, by name."""
    rank = sketch_sizes(pricing.facts.key_elements)[0].rank
    found = {"tuned": solution.config}
    for group_tokens in GROUPS:
        config = Config(kv_memory=limit_bytes, select_tokens=400, group_tokens=group_tokens, sketch_rank=rank)
        if pricing.needs(config, 1).minimum_bytes(solution.context_tokens) <= limit_bytes:
            found[f"G = {group_tokens}"] = config
    return found


def expected(pricing: Pricing, config: Config, tokens: int) -> dict[str, float]:
    """Return the predictions of the cost model and the tables for a configuration."""
    request = Request(
        limit_bytes=int(config.kv_memory), context_tokens=tokens, batch=1, select_tokens=config.select_tokens
    )
    price = pricing.price(config, request)
    assert price is not None
    return {
        "step_ms": 1e3 * price.cost.step_s,
        "expected_kl": price.expected_kl,
        "promised_kl": price.kl_bound,
        "reuse_rate": price.traffic.reuse_rate,
    }


def row(name: str, config: Config, predicted: dict[str, float], found: list[Measured]) -> dict[str, Any]:
    """Return predicted and measured values of one configuration. ``kl`` is the mean of ``kl_by_text``.

    ``promised_kl`` is the bound, under the key that earlier results files have.
    """
    by_text = [each.kl for each in found if each.kl is not None]
    return {
        "name": name,
        "group_tokens": config.group_tokens,
        "sketch": [config.sketch_rank, config.sketch_bits],
        "by_layer": config.layer_select_tokens is not None,
        "reuse_slots": found[0].reuse_slots,
        "step_ms": [predicted["step_ms"], 1e3 * statistics.median(each.step_s for each in found)],
        "expected_kl": predicted["expected_kl"],
        "promised_kl": predicted["promised_kl"],
        "kl": statistics.fmean(by_text),
        "kl_by_text": by_text,
        "texts_kept": sum(each <= predicted["promised_kl"] for each in by_text),
        "reuse_rate": [predicted["reuse_rate"], statistics.fmean(each.reuse_rate for each in found)],
        "reads": statistics.fmean(each.reads for each in found),
        "peak_bytes": max(each.kv_memory_peak_bytes for each in found),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table, and the tuned configuration relative to the best of the sweep."""
    for each in rows:
        rank, bits = each["sketch"]
        text = (
            f"{each['name']:7} G {each['group_tokens']:2} rank {rank} x {bits} {'by layer' if each['by_layer'] else ''}"
        )
        print(
            f"{text:36} slots {each['reuse_slots']:5} step {each['step_ms'][0]:.1f}/{each['step_ms'][1]:.1f} ms  "
            f"KL expected {each['expected_kl']:.4f} bound {each['promised_kl']:.4f} measured {each['kl']:.4f}  "
            f"reuse {each['reuse_rate'][0]:.2f}/{each['reuse_rate'][1]:.2f}"
        )
    tuned, *others = rows
    best = min(others, key=lambda each: each["step_ms"][1])
    print(
        f"tuned / best of the sweep ({best['name']}): time {tuned['step_ms'][1] / best['step_ms'][1]:.3f}, "
        f"KL {tuned['kl'] / best['kl']:.2f}; measured / bound KL {tuned['kl'] / tuned['promised_kl']:.2f}, "
        f"measured / expected {tuned['kl'] / tuned['expected_kl']:.2f}; "
        f"{tuned['texts_kept']} of {len(tuned['kl_by_text'])} texts below the bound"
    )


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-memory", default="16MiB")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--prefer", choices=["quality", "speed"], default="quality")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--label", default="", help="what is special about the disk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model)
    facts = model_facts(loaded, inspect(loaded.model))
    profile = load_profile(args.profile, None, facts)
    tables = load_tables(cached_tables(facts.fingerprint), facts.fingerprint, facts.layers)
    tuned = tune(
        loaded,
        kv_memory=args.kv_memory,
        context_tokens=args.context,
        prefer=args.prefer,
        profile=profile,
        tables=tables,
    )
    solution = tuned.solutions[0]
    print("\n".join(solution.reasons))
    pricing = Pricing(profile, tables, facts, loaded.model.device)
    configs = sweep(pricing, solution, parse_bytes(args.kv_memory, name="kv_memory"))
    found = [
        measure_steps(
            loaded, list(configs.values()), tokens=args.context, steps=args.steps, start=number * args.context
        )
        for number in range(args.texts)
    ]
    rows = [
        row(name, config, expected(pricing, config, args.context), [text[place] for text in found])
        for place, (name, config) in enumerate(configs.items())
    ]
    show(rows)
    if args.json:
        about = {
            "model": facts.name.rsplit("/", 1)[-1],
            "context_tokens": args.context,
            "kv_memory": args.kv_memory,
            "prefer": args.prefer,
            "label": args.label,
            "threads": torch.get_num_threads(),
            "steps": args.steps,
            "texts": args.texts,
            "stamp": dataclasses.asdict(profile.stamp),
            "reasons": solution.reasons,
        }
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
