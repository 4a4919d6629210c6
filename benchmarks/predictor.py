"""Compare the quality of kvswap's predictor with the published scheme in the same memory.

    python benchmarks/predictor.py --model smollm2-135m --context 7000 --texts 8 --steps 64 --json FILE [--prompts DIR]

Variants are both methods with the relaxed sketch (D/8 x 2 bytes per token and layer) and the tight one (D/32 x 2), with
G = 4 and G = 8, under one memory limit. Everything that grows with tokens counts as sketch. With ``--tuned FILE`` the
variants are the solution of ``kvswap tune`` for this context, and both methods' tight setting with G = 8 under the same
limit.

Texts are those of ``kvswap eval --task agreement --samples 8``, which were never calibrated on. Each prompt is computed
once. Then full attention and all variants take the same tokens one by one, as rows of one batch. KL is KL(full ||
variant) of the next-token distribution in nats.

An existing file is continued. Texts are taken from both ends inwards, so that an interrupted run has spread texts, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from kvswap import Config
from kvswap.core.attach import attach_each
from kvswap.disk.json_files import write_json
from kvswap.lab.evals.cache_batch import force_batched
from kvswap.lab.evals.evaluation_text import evaluation_text
from kvswap.lab.evals.prompt_cache import PromptCache
from kvswap.lab.evals.samples import Sample, Source
from kvswap.lab.evals.tasks import find_task
from kvswap.lab.evals.variants import PUBLISHED, SketchSetting
from kvswap.lab.rivals.registry import with_methods
from kvswap.models.adapter import inspect
from kvswap.models.identity import attention_fingerprint
from kvswap.models.loading import load_model
from kvswap.tuning.solution import Solution, load_tuned

METHODS = ("kvswap", "kvswap-paper")
SELECTED = 400
"""M of all variants: the number of the published scheme."""
TEXTS, MOST_STEPS = 8, 64
"""Texts are cut for these numbers, even if fewer are used."""


def variants(elements: int, kv_memory: str) -> dict[str, tuple[str, Config]]:
    """Return methods and configurations by name, for keys of ``elements`` elements (D)."""
    config, found = Config(kv_memory=kv_memory, select_tokens=SELECTED), {}
    for group_tokens in (4, 8):
        for setting in PUBLISHED:
            for method in METHODS:
                values = SketchSetting(setting, group_tokens).apply(config, elements)
                found[f"{method} {setting} G{group_tokens}"] = (method, values)
    return found


def beside_tuned(elements: int, solution: Solution) -> dict[str, tuple[str, Config]]:
    """Return a tuned configuration, and both methods' tight setting with G = 8 under its limit, by name."""
    tuned = solution.config
    tight = SketchSetting("tight", 8).apply(Config(kv_memory=tuned.kv_memory, select_tokens=SELECTED), elements)
    return {"kvswap tuned": ("kvswap", tuned), **{f"{method} tight G8": (method, tight) for method in METHODS}}


def run_text(
    loaded: Any, sample: Sample, steps: int, methods: dict[str, tuple[str, Config]], prompts: PromptCache
) -> dict[str, Any]:
    """Run one text with full attention and all variants; return the row for the file."""
    first = next(iter(methods.values()))[1]
    variants = with_methods([("full", first), *methods.values()])
    with attach_each(loaded.model, variants, tokenizer=loaded.tokenizer) as caches:
        row = prompts.fill(loaded.model, caches[0], sample.prompt)
        for cache in caches[1:]:
            cache.adopt(caches[0])
        named = dict(zip(("full", *methods), caches, strict=True))
        runs = force_batched(loaded.model, named, sample.forced[:steps], row)
        stats = {name: cache.stats for name, cache in named.items()}
    return {
        "index": sample.index,
        "prompt_hash": sample.prompt_hash,
        "context": sample.context,
        "kv_memory": first.kv_memory,
        "steps": steps,
        "methods": {
            name: {
                "kl": run.kl,
                "same": run.same,
                "nll": run.nll,
                "sketch": stats[name].sketch,
                "sketch_bytes": stats[name].memory_parts.get("sketch"),
                "peak": stats[name].kv_memory_peak_bytes,
            }
            for name, run in runs.items()
        },
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format one line per variant: KL with its standard error over texts, top-1 agreement, sketch."""
    lines = []
    for name in rows[0]["methods"]:
        kl = [statistics.fmean(row["methods"][name]["kl"]) for row in rows]
        same = statistics.fmean(each for row in rows for each in row["methods"][name]["same"])
        error = statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
        sketch = rows[0]["methods"][name]["sketch"]
        lines.append(f"{name:28} KL {statistics.fmean(kl):.4f} ± {error:.4f}  same {same:.1%}  {sketch}")
    return lines


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"at most {TEXTS}")
    parser.add_argument("--steps", type=int, default=MOST_STEPS, help=f"at most {MOST_STEPS}")
    parser.add_argument("--kv-memory", default="24MiB")
    parser.add_argument("--prompts", type=Path, help="keep computed prompts there")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="a file of kvswap tune instead of the settings")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model(args.model, dtype="float32")
    parts = inspect(loaded.model)
    elements = parts.kv_heads * parts.head_dim
    methods = variants(elements, args.kv_memory)
    if args.tuned is not None:
        tuned = load_tuned(args.tuned)
        tuned.check_model(attention_fingerprint(parts))
        methods = beside_tuned(elements, tuned.nearest(context_tokens=args.context))
    source = Source(tokenizer=loaded.tokenizer, passages=evaluation_text(), seed=0, steps=MOST_STEPS)
    prompts = PromptCache(args.prompts)
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    done = {row["prompt_hash"] for row in rows}
    samples = list(find_task("agreement").make(source, args.context, TEXTS))
    inwards = [samples[each // 2 if each % 2 == 0 else -1 - each // 2] for each in range(TEXTS)]
    for sample in inwards[: args.texts]:
        if sample.prompt_hash not in done:
            rows.append(run_text(loaded, sample, args.steps, methods, prompts))
            write_json(args.json, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
