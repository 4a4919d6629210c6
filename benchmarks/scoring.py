"""Measure the time to score a sketch and choose groups in one layer, over the length of the context.

    python benchmarks/scoring.py --tokens 8192,32768,131072,1048576 --json out.json

Keys are random. One thread; the result is the fastest of twelve calls.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvswap.selection.basis import KeyCovariance
from kvswap.selection.choose import top_groups
from kvswap.selection.transform_sketch import TransformSketch, transform_basis

SHAPES = {"SmolLM2-135M": (3, 64, 9), "Qwen2.5-Coder-0.5B": (2, 64, 14), "Llama-3.1-8B": (8, 128, 32)}
"""KV heads, head_dim, query heads."""
SETTINGS = ((2, 4), (4, 2))
"""Elements of a key per number of the sketch, and bits of a number: D/8 x 2 bytes per token, and half of that."""
GROUP_TOKENS, CHOSEN, TURNS = 4, 88, 12


def measure(shape: tuple[int, int, int], tokens: int, elements_a_digit: int, bits: int) -> float:
    """Return the seconds of the fastest call."""
    kv_heads, head_dim, query_heads = shape
    generator = torch.Generator().manual_seed(0)
    statistics = KeyCovariance(kv_heads, head_dim)
    statistics.add(torch.randn(1024, kv_heads, head_dim, generator=generator))
    statistics.add_queries(torch.randn(query_heads, 1024, head_dim, generator=generator))
    sketch = TransformSketch(
        batch=1,
        kv_heads=kv_heads,
        head_dim=head_dim,
        basis=transform_basis(statistics, kv_heads * head_dim // elements_a_digit, bits),
        bits=bits,
        capacity_tokens=tokens,
        device=torch.device("cpu"),
    )
    for start in range(0, tokens, 8192):
        count = min(8192, tokens - start)
        sketch.append(0, torch.randn(kv_heads, count, head_dim, generator=generator))
    times_s = []
    for _ in range(TURNS):
        query = torch.randn(1, query_heads, head_dim, generator=generator)
        started_s = time.perf_counter()
        scores = sketch.group_mass(query, head_dim**-0.5, GROUP_TOKENS)
        top_groups(scores, 1, [tokens // GROUP_TOKENS - 16], CHOSEN)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", metavar="N,...", default="8192,32768,131072,1048576")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lengths = [int(text) for text in arguments.tokens.split(",")]
    torch.set_num_threads(1)
    table, results = Table("keys", "digits", *(f"{tokens:,}" for tokens in lengths)), []
    for name, shape in SHAPES.items():
        for elements_a_digit, bits in SETTINGS:
            rank = shape[0] * shape[1] // elements_a_digit
            times_s = [measure(shape, tokens, elements_a_digit, bits) for tokens in lengths]
            table.add_row(name, f"{rank} of {bits} bit", *(f"{1e3 * each:.2f} ms" for each in times_s))
            results += [
                {"keys": name, "digits": rank, "bits": bits, "tokens": tokens, "score_s": each}
                for tokens, each in zip(lengths, times_s, strict=True)
            ]
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
