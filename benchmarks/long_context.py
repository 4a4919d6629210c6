"""Compare kvswap's default selection with a fixed one and with full attention on long texts.

    python benchmarks/long_context.py --model DIR --document BOOK.txt --context 8192,16384,32000 --json FILE

Each text is one stretch of the document. Its longest prompt is computed once with full attention, and shorter contexts
are beginnings of it, so one prompt serves all. Then full attention and every variant take the same tokens one by one
(teacher-forced), in turns. Reported are KL(full || variant) of the next token in nats, the share of steps with the same
likeliest token, the median time of a step, and what was read.

An existing file is continued. ``--prompts DIR`` keeps computed prompts, each as large as the full cache in the model's
dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvswap import Config
from kvswap.app.documents import read_document
from kvswap.core.attach import attach_each
from kvswap.disk.json_files import write_json
from kvswap.lab.evals.evaluation_text import evaluation_text
from kvswap.lab.evals.prompt_cache import PromptCache
from kvswap.lab.evals.teacher_forcing import ForcedRun, force
from kvswap.lab.rivals.registry import with_methods
from kvswap.models.loading import load_model

VARIANTS: dict[str, tuple[str, Config]] = {
    "kvswap": ("kvswap", Config()),
    "kvswap, M = 400": ("kvswap", Config(select_tokens=400)),
    "kvswap-paper, M = 400": ("kvswap-paper", Config(select_tokens=400)),
}
WARM_STEPS = 4
"""Steps at the beginning whose time does not count: slots fill, and memory is touched for the first time."""


def stretches(ids: list[int], texts: dict[int, int], steps: int) -> Iterator[tuple[int, int, list[int]]]:
    """Text number, context and its tokens with the forced ones; the longest context of a text comes first.

    ``texts`` says how many texts each context has. A context with fewer of them takes every second one, every fourth
    one and so on.
    """
    spare, most = len(ids) - max(texts) - steps, max(texts.values())
    if spare < 0:
        raise SystemExit(f"the document has {len(ids):,} tokens, {max(texts) + steps:,} are needed")
    for text in range(most):
        start = spare * text // most
        for context in sorted(texts, reverse=True):
            if text % (most // texts[context]) == 0:
                yield text, context, ids[start : start + context + steps]


def document_tokens(tokenizer: Any, document: Path | None) -> list[int]:
    """Token ids of the document, or of the project's evaluation text."""
    passages = evaluation_text([read_document(document)] if document else [])
    return tokenizer("\n\n".join(each for _, each in passages), add_special_tokens=False, verbose=False)["input_ids"]


def measure(loaded: Any, ids: list[int], steps: int, prompts: PromptCache) -> dict[str, Any]:
    """Run full attention and all variants over one stretch; return a result for each by name."""
    methods = {"full": ("full", Config()), **VARIANTS}
    with attach_each(loaded.model, with_methods(methods.values()), tokenizer=loaded.tokenizer) as caches:
        row = prompts.fill(loaded.model, caches[0], tuple(ids[:-steps]))
        for cache in caches[1:]:
            cache.adopt(caches[0])
        runs = {name: ForcedRun() for name in methods}
        named = dict(zip(methods, caches, strict=True))
        force(loaded.model, named, ids[-steps:], dict.fromkeys(methods, row), runs)
        return {name: result(runs[name], cache.stats) for name, cache in named.items()}


def result(run: ForcedRun, stats: Any) -> dict[str, Any]:
    """What is kept of one variant on one stretch."""
    steps = max(1, stats.decode_steps)
    return {
        "kl": run.kl,
        "same": run.same,
        "step_ms": 1e3 * statistics.median(run.step_s[WARM_STEPS:]),
        "select_tokens": stats.select_tokens,
        "mass_kept": stats.mass_kept,
        "kv_memory_limit_bytes": stats.kv_memory_limit_bytes,
        "kv_memory_peak_bytes": stats.kv_memory_peak_bytes,
        "reuse_rate": stats.reuse_rate,
        "reads_per_step": stats.disk_reads / steps,
        "read_bytes_per_step": stats.disk_read_bytes / steps,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format a Markdown table: one line for each context and variant, means over texts."""
    head = ["context", "texts", "method", "M", "KL", "same token", "step, full = 1", "read a step", "KV memory"]
    lines = [f"| {' | '.join(head)} |", "|--:|--:|---|--:|--:|--:|--:|--:|--:|"]
    for context in sorted({row["context"] for row in rows}):
        here = [row["methods"] for row in rows if row["context"] == context]
        for name in here[0]:
            own = [each[name] for each in here]
            ratio = statistics.fmean(each[name]["step_ms"] / each["full"]["step_ms"] for each in here)
            kl = statistics.fmean(statistics.fmean(each["kl"]) for each in own)
            same = statistics.fmean(statistics.fmean(each["same"]) for each in own)
            read = statistics.fmean(each["read_bytes_per_step"] for each in own) / 1e6
            memory = max(each["kv_memory_peak_bytes"] for each in own) / 2**20
            cells = [f"{context:,}", f"{len(own)}", name, f"{own[0]['select_tokens']:,}", f"{kl:.4f}", f"{same:.1%}"]
            cells += [f"{ratio:.2f}", f"{read:.1f} MB", f"{memory:.0f} MiB"]
            if name == "full":
                cells[3:6] = ["all", "", ""]
                cells[7:] = ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--document", type=Path, help="a text in UTF-8; default: the project's evaluation text")
    parser.add_argument("--context", default="8192,16384,32000", help="tokens, with commas between them")
    parser.add_argument("--texts", default="1", help="texts at each context, one number or as many as contexts")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompts", type=Path, help="keep computed prompts there")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model(args.model, dtype=args.dtype)
    ids = document_tokens(loaded.tokenizer, args.document)
    prompts = PromptCache(args.prompts)
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    done = {(row["text"], row["context"]) for row in rows}
    contexts = [int(each) for each in args.context.split(",")]
    counts = [int(each) for each in args.texts.split(",")]
    texts = dict(zip(contexts, counts if len(counts) > 1 else counts * len(contexts), strict=True))
    for number, context, stretch in stretches(ids, texts, args.steps):
        if (number, context) not in done:
            about = {"text": number, "context": context, "steps": args.steps, "document_tokens": len(ids)}
            rows.append({**about, "methods": measure(loaded, stretch, args.steps, prompts)})
            write_json(args.json, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
