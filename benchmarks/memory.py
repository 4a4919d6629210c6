"""The ledger beside the kernel's count: growth of anonymous memory in prefill and in decode.

    python benchmarks/memory.py --model smollm2-135m --tokens 7000 --steps 200 [--json out.json]

Weights are copied into memory first (as with --no-mmap) and a short prompt is run, so that what grows afterwards is the
cache, prefill's passing needs and nothing else. RssAnon is sampled every 5 ms by a second thread. Linux only.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch

import kvswap
from kvswap.corpus import evaluation_topics
from kvswap.models.adapter import cache_keyword
from kvswap.models.loading import load_model
from kvswap.units import MIB


def rss_anon_bytes() -> int:
    """Anonymous memory of this process that is resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the kernel tells no RssAnon")


class Peak:
    """Largest RssAnon while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = rss_anon_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, rss_anon_bytes())
            time.sleep(0.005)


@torch.no_grad()
def measure(model: Any, ids: list[int], steps: int, tokenizer: Any, config: kvswap.Config) -> dict[str, int]:
    """Bytes by the kernel and by the ledger."""
    keyword = cache_keyword(model)
    with kvswap.attach(model, config, tokenizer=tokenizer) as cache:  # calibrates; warms up all libraries
        model(input_ids=torch.tensor([ids[:600]]), use_cache=True, logits_to_keep=1, **{keyword: cache})
        model(input_ids=torch.tensor([ids[600:601]]), use_cache=True, **{keyword: cache})
    with kvswap.attach(model, config, tokenizer=tokenizer) as cache:
        before = rss_anon_bytes()
        with Peak() as prefill:
            model(input_ids=torch.tensor([ids[:-steps]]), use_cache=True, logits_to_keep=1, **{keyword: cache})
        after_prefill = rss_anon_bytes()
        with Peak() as decode:
            for token in ids[-steps:]:
                model(input_ids=torch.tensor([[token]]), use_cache=True, **{keyword: cache})
        stats = cache.stats
    return {
        "prefill_growth_bytes": prefill.bytes - before,
        "prefill_peak_bytes": stats.prefill_peak_bytes,
        "after_prefill_growth_bytes": after_prefill - before,
        "decode_growth_bytes": decode.bytes - before,
        "kv_memory_peak_bytes": stats.kv_memory_peak_bytes,
        "kv_memory_limit_bytes": stats.kv_memory_limit_bytes or 0,
        "kv_full_bytes": stats.kv_full_bytes,
        "after_close_growth_bytes": rss_anon_bytes() - before,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kv-memory", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model, dtype="float32", mmap=False)
    text = "\n\n".join(text for _, text in evaluation_topics())
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][: args.tokens + args.steps]
    result = measure(loaded.model, ids, args.steps, loaded.tokenizer, kvswap.Config(kv_memory=args.kv_memory))
    for name, count_bytes in result.items():
        print(f"{name:28} {count_bytes / MIB:9.1f} MiB")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
