"""Compare the memory that kvswap reports with the kernel's count of anonymous memory, in prefill and in decode.

    python benchmarks/memory.py --model smollm2-135m --tokens 4000,7000 --steps 200 [--json out.json]

Weights are first copied into memory (as with --no-mmap), and the prompt and a step run in another cache. What the
libraries take when they are first used is there by then, also that of the first read from disk. Growth after that comes
from the measured cache, including its basis, and from transient memory of prefill.

The allocator is set to return freed memory to the kernel. Freed memory that a process keeps would hide the same amount
of later growth. A second thread samples RssAnon every millisecond. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch

import kvswap
from kvswap.core.corpus import evaluation_topics
from kvswap.memory.budget import PROMPT_PARTS
from kvswap.models.adapter import cache_keyword
from kvswap.models.loading import load_model
from kvswap.units import MIB

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
OWN_BLOCK_BYTES = 64 << 10


def rss_anon_bytes() -> int:
    """Return the resident anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux 4.5 or newer")


def give_back() -> None:
    """Return freed memory to the kernel now, and freed large blocks immediately from now on."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, OWN_BLOCK_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, OWN_BLOCK_BYTES)
    libc.malloc_trim(0)


class Peak:
    """Records the largest RssAnon while the block runs."""

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
            time.sleep(0.001)


@torch.no_grad()
def measure(
    model: Any, ids: list[int], steps: int, tokenizer: Any, config: kvswap.Config, append: int = 0
) -> dict[str, int]:
    """Measure one prompt (all but the last ``steps`` of ``ids``) and ``steps`` decode steps; return bytes by name.

    With ``append``, the last ``append`` tokens of the prompt come as a second prompt, and the peak is that of both.
    ``decode_held_bytes`` is the growth between steps, after the allocator has returned everything it freed.
    """
    keyword = cache_keyword(model)

    def feed(cache: Any, tokens: list[int]) -> None:
        model(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1, **{keyword: cache})

    give_back()
    with kvswap.attach(model, config, tokenizer=tokenizer) as cache:  # calibrates; warms up libraries, also for reads
        feed(cache, ids[:-steps])
        for token in ids[-steps:]:
            feed(cache, [token])
    give_back()
    before = rss_anon_bytes()
    with kvswap.attach(model, config, tokenizer=tokenizer) as cache:
        prompt = ids[:-steps]
        with Peak() as prefill:
            feed(cache, prompt[: len(prompt) - append])
            if append:
                feed(cache, prompt[len(prompt) - append :])
        after_prefill = rss_anon_bytes()
        give_back()  # the allocator keeps a few MiB of small blocks
        held_bytes = rss_anon_bytes()
        with Peak() as decode:
            for number, token in enumerate(ids[-steps:]):
                feed(cache, [token])
                if number % 8 == 7:
                    give_back()
                    held_bytes = max(held_bytes, rss_anon_bytes())
        stats = cache.stats
    give_back()
    return {
        "prompt_tokens": len(prompt),
        "appended_tokens": append,
        "chunk_tokens": config.chunk_tokens,
        "steps": steps,
        "prefill_growth_bytes": prefill.bytes - before,
        "prefill_peak_bytes": stats.prefill_peak_bytes,
        "after_prefill_growth_bytes": after_prefill - before,
        "decode_growth_bytes": decode.bytes - before,
        "decode_held_bytes": held_bytes - before,
        "prompt_parts_bytes": sum(stats.memory_parts[part] for part in PROMPT_PARTS),
        "kv_memory_peak_bytes": stats.kv_memory_peak_bytes,
        "kv_memory_limit_bytes": stats.kv_memory_limit_bytes or 0,
        "sliding_kv_bytes": stats.sliding_kv_bytes,
        "kv_full_bytes": stats.kv_full_bytes,
        "after_close_growth_bytes": rss_anon_bytes() - before,
    }


def show(result: dict[str, int]) -> None:
    """Print one line for each number, and the difference between reported and measured memory."""
    for name, count in result.items():
        text = f"{count / MIB:9.1f} MiB" if name.endswith("_bytes") else f"{count:9}"
        print(f"{name:28} {text}")
    prefill = result["prefill_peak_bytes"] / result["prefill_growth_bytes"] - 1
    decode = result["kv_memory_peak_bytes"] + result["sliding_kv_bytes"] - result["decode_growth_bytes"]
    print(f"reported - measured: prefill {prefill:+.1%}, decode {decode / MIB:+.1f} MiB\n")


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", default="7000", help="lengths of prompts, one run each")
    parser.add_argument("--append", default="0", help="how many of them come as a second prompt, for each run")
    parser.add_argument("--chunk-tokens", default="512", help="for each run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kv-memory", default="auto", help="for each run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model, dtype="float32", mmap=False)
    text = "\n\n".join(text for _, text in evaluation_topics())
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    lists = [each.split(",") for each in (args.tokens, args.append, args.chunk_tokens, args.kv_memory)]
    runs = max(len(each) for each in lists)
    results = []
    for tokens, append, chunk, memory in zip(*(each * (runs if len(each) == 1 else 1) for each in lists), strict=True):
        config = kvswap.Config(kv_memory=memory, chunk_tokens=int(chunk))
        taken = ids[: int(tokens) + args.steps]
        results.append(measure(loaded.model, taken, args.steps, loaded.tokenizer, config, int(append)))
        show(results[-1])
    if args.json:
        about = {"model": loaded.short_name, "dtype": "float32", "torch": torch.__version__}
        args.json.write_text(json.dumps({**about, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
