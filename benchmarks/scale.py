"""Measure memory and step time from 32K to 1M tokens without a model: synthetic K, V in SmolLM2-135M's geometry.

    python benchmarks/scale.py --tokens 32768,131072,524288,1048576 --steps 40 --json out.json --plot out.png

Each size is filled, measured and removed before the next; 1M tokens take 23 GB of disk. Sizes that do not fit the free
disk space are left out with a notice.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from kvswap import Config
from kvswap.cli.display import Display
from kvswap.disk.json_files import write_json
from kvswap.lab.bench.scale import fits, kv_bytes, measure_scale
from kvswap.lab.plots import plot_scale
from kvswap.tuning.machine import describe_machine
from kvswap.tuning.plots import check_plot
from kvswap.units import format_bytes


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="32768,131072,524288,1048576", metavar="N,...")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kv-dir")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot:
        check_plot(args.plot)
    config, display, rows, skipped = Config(kv_dir=args.kv_dir, select_tokens=400), Display(), [], []
    for tokens in map(int, args.tokens.split(",")):
        if not fits(tokens, config):
            display.notice(
                f"{tokens:,} tokens are left out: they take {format_bytes(kv_bytes(tokens))} of disk, which is not free"
            )
            skipped.append(tokens)
            continue
        row = measure_scale(tokens, args.steps, config, on_progress=display.progress)
        rows.append(row)
        parts = ", ".join(f"{name.removesuffix('_s')} {1e3 * value:.1f}" for name, value in row["parts_s"].items())
        print(f"{tokens:>9,} tokens: step {1e3 * row['median_step_s']:.1f} ms ({parts}); "
              f"{row['memory_bytes_per_token']:,.0f} bytes per token", flush=True)  # fmt: skip
        if args.json:
            environment = {"machine": dataclasses.asdict(describe_machine()), "threads": torch.get_num_threads()}
            write_json(args.json, {"environment": environment, "results": rows, "skipped_tokens": skipped})
    if args.plot and rows:
        plot_scale(rows, args.plot)


if __name__ == "__main__":
    main()
