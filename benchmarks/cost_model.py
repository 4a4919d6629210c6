"""Compare the cost model's predictions with measured decode steps, part by part, for several settings.

    python benchmarks/cost_model.py --model smollm2-135m --profile p.json [--json out.json]

Settings differ in group size, selection, reuse memory and context. Each runs 50 steps over evaluation text with teacher
forcing, interleaved with the others. Its time is the median of the medians of five blocks of steps. The profile comes
from ``kvswap profile``, the tables from the cache of ``kvswap tune``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvswap
from kvswap.lab.verify import Measured, measure_steps
from kvswap.models.adapter import inspect
from kvswap.models.loading import LoadedModel, load_model
from kvswap.tuning.measure_model import model_facts
from kvswap.tuning.profile import load_profile
from kvswap.tuning.search import Candidate, Pricing, Request
from kvswap.tuning.tables import cached_tables, load_tables, sketch_sizes
from kvswap.units import MIB

# group_tokens, select_tokens, reuse memory in MiB
SETTINGS = ((1, 400, 0), (2, 400, 4), (4, 400, 0), (4, 400, 12), (8, 400, 2), (16, 400, 6), (4, 200, 1), (4, 800, 4))


def priced(pricing: Pricing, config: kvswap.Config, tokens: int) -> Candidate:
    """Price a configuration whose ``kv_memory`` is a number of bytes."""
    request = Request(
        limit_bytes=int(config.kv_memory), context_tokens=tokens, batch=1, select_tokens=config.select_tokens
    )
    found = pricing.price(config, request)
    assert found is not None
    return found


def settings(pricing: Pricing, contexts: list[int]) -> Iterator[tuple[int, list[kvswap.Config]]]:
    """Yield each context with its share of the settings."""
    rank = sketch_sizes(pricing.facts.key_elements)[0].rank
    for number, tokens in enumerate(contexts):
        configs = []
        for group, select, reuse_mib in SETTINGS[number :: len(contexts)]:
            config = kvswap.Config(group_tokens=group, select_tokens=select, sketch_rank=rank)
            least = pricing.needs(config, 1).minimum_bytes(tokens)
            configs.append(config.replace(kv_memory=least + reuse_mib * MIB))
        yield tokens, configs


def row(config: kvswap.Config, tokens: int, price: Candidate, found: Measured) -> dict[str, Any]:
    """Return predicted and measured values of one setting, as pairs."""
    cost = price.cost
    return {
        "tokens": tokens,
        "group_tokens": config.group_tokens,
        "select_tokens": config.select_tokens,
        "by_layer": price.by_layer,
        "sketch": str(price.sketch),
        "kv_memory": config.kv_memory,
        "reuse_slots": [price.reuse_slots, found.reuse_slots],
        "step_ms": [1e3 * cost.step_s, 1e3 * found.step_s],
        **{name: [1e3 * getattr(cost, name), 1e3 * value] for name, value in found.parts_s.items()},
        "reads": [cost.reads, found.reads],
        "read_mb": [cost.read_bytes / 1e6, found.read_bytes / 1e6],
        "reuse_rate": [price.traffic.reuse_rate, found.reuse_rate],
        "kl": [price.expected_kl, found.kl],
    }


def show(each: dict[str, Any]) -> None:
    """Print one line for a setting, as predicted/measured."""
    ratio = each["step_ms"][1] / each["step_ms"][0]
    text = " ".join(
        f"{name.removesuffix('_s')} {each[name][0]:.1f}/{each[name][1]:.1f}"
        for name in ("step_ms", "compute_s", "predict_s", "slots_s", "submit_s", "wait_s", "reads", "read_mb")
    )
    print(
        f"T {each['tokens']} G {each['group_tokens']} M {each['select_tokens']} {each['sketch']} slots "
        f"{each['reuse_slots']} ratio {ratio:.2f}: {text} reuse {each['reuse_rate'][0]:.2f}/{each['reuse_rate'][1]:.2f}"
        + (f" KL {each['kl'][0]:.4f}/{each['kl'][1]:.4f}" if each["kl"][1] is not None else "")
    )


def runs(loaded: LoadedModel, pricing: Pricing, contexts: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """Measure all settings and yield their rows."""
    for tokens, configs in settings(pricing, contexts):
        found = measure_steps(loaded, configs, tokens=tokens, steps=steps)
        for config, measured in zip(configs, found, strict=True):
            yield row(config, tokens, priced(pricing, config, tokens), measured)


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--contexts", default="2048,6144")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model)
    facts = model_facts(loaded, inspect(loaded.model))
    profile = load_profile(args.profile, None, facts)
    tables = load_tables(cached_tables(facts.fingerprint), facts.fingerprint, facts.layers)
    found = []
    pricing, contexts = Pricing(profile, tables, facts, loaded.model.device), args.contexts.split(",")
    for each in runs(loaded, pricing, [int(context) for context in contexts], args.steps):
        found.append(each)
        show(each)
    if args.json:
        about = {
            "model": facts.name.rsplit("/", 1)[-1],
            "threads": facts.threads,
            "stamp": dataclasses.asdict(profile.stamp),
        }
        args.json.write_text(json.dumps({**about, "settings": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
