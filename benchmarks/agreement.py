"""Measure quality, speed and memory of kvswap against full attention on real text.

    python benchmarks/agreement.py --model smollm2-135m --texts 8 --tokens 7000 --steps 48 --json out.json

The texts are topics of Python's language reference that were never calibrated on. For every text, stock transformers
with a DynamicCache and kvswap take the same prompt. Then both take the same ``--steps`` tokens one by one (teacher
forcing), interleaved, so that a machine that slows down does so for both. KL is KL(full || kvswap) of the next-token
distribution in nats, as the mean over steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvswap
from kvswap.core.corpus import evaluation_topics
from kvswap.lab.evals.teacher_forcing import run_forced
from kvswap.models.loading import load_model


def texts(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Cut ``count`` texts of ``tokens`` token ids, evenly spread, from the joined evaluation topics."""
    joined: list[int] = []
    for _, text in evaluation_topics():
        joined += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
    stretch = (len(joined) - tokens) // max(1, count - 1)
    return [joined[i * stretch : i * stretch + tokens] for i in range(count)]


def run_text(model: Any, tokenizer: Any, ids: list[int], steps: int, config: kvswap.Config) -> dict[str, Any]:
    """Run one text with both methods; return the result ready for JSON."""
    with kvswap.attach(model, config, tokenizer=tokenizer) as ours:
        runs = run_forced(model, {"full": DynamicCache(config=model.config), "kvswap": ours}, ids, steps)
        stats = ours.stats
    full, run = runs["full"], runs["kvswap"]
    return {
        "kl": run.kl,
        "same": run.same,
        "full_prefill_s": full.prefill_s,
        "prefill_s": run.prefill_s,
        "full_step_s": full.median_step_s,
        "step_s": run.median_step_s,
        "full_mean_step_s": statistics.mean(full.step_s),
        "mean_step_s": statistics.mean(run.step_s),
        "io_wait_s": stats.io_wait_s,
        "reuse_rate": stats.reuse_rate,
        "disk_read_bytes": stats.disk_read_bytes,
        "kv_full_bytes": stats.kv_full_bytes,
        "kv_memory_limit_bytes": stats.kv_memory_limit_bytes,
        "kv_memory_peak_bytes": stats.kv_memory_peak_bytes,
        "memory_parts": stats.memory_parts,
        "prefill_peak_bytes": stats.prefill_peak_bytes,
        "backend": stats.backend,
        "sketch": stats.sketch,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over texts with their standard errors, and ratios to full attention."""
    kl = [statistics.mean(row["kl"]) for row in rows]
    same = [statistics.mean(row["same"]) for row in rows]
    error = (lambda values: statistics.stdev(values) / len(values) ** 0.5) if len(rows) > 1 else (lambda values: None)
    return {
        "kl": statistics.mean(kl),
        "kl_stderr": error(kl),
        "top1": statistics.mean(same),
        "top1_stderr": error(same),
        "decode_speed_ratio": statistics.median(row["full_step_s"] / row["step_s"] for row in rows),
        "decode_mean_speed_ratio": statistics.median(row["full_mean_step_s"] / row["mean_step_s"] for row in rows),
        "decode_tokens_per_s": 1 / statistics.median(row["step_s"] for row in rows),
        "full_decode_tokens_per_s": 1 / statistics.median(row["full_step_s"] for row in rows),
        "prefill_time_ratio": statistics.median(row["prefill_s"] / row["full_prefill_s"] for row in rows),
        "memory_share": max(row["kv_memory_peak_bytes"] / row["kv_full_bytes"] for row in rows),
        "within_limit": all(row["kv_memory_peak_bytes"] <= row["kv_memory_limit_bytes"] for row in rows),
        "reuse_rate": statistics.mean(row["reuse_rate"] for row in rows),
    }


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config values")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    values = dict(item.split("=", 1) for item in args.set)
    config = kvswap.Config(**{key: int(value) if value.isdigit() else value for key, value in values.items()})
    loaded = load_model(args.model, dtype=args.dtype)
    rows = []
    for number, ids in enumerate(texts(loaded.tokenizer, args.texts, args.tokens + args.steps)):
        rows.append(run_text(loaded.model, loaded.tokenizer, ids, args.steps, config))
        line = summary(rows[-1:])
        print(number, {key: round(value, 4) for key, value in line.items() if isinstance(value, float)}, flush=True)
    result = {
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "json"} | {"model": loaded.name},
        "config": config.to_dict(),
        "machine": {"cpu": platform.processor(), "system": platform.platform(), "torch": torch.__version__},
        "summary": summary(rows),
        "texts": rows,
    }
    print(json.dumps(result["summary"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
