"""Compare the rate of kvswap's io_uring reads with that of fio's io_uring engine, on the same file.

    python benchmarks/disk_vs_fio.py [--dir FOLDER] [--json FILE]

Both read a file of ``--size`` random bytes with direct random reads at depth 64, for ``--seconds`` per turn. Turns
alternate (fio, kvswap, fio, kvswap, ...), so that a disk that drifts does so for both. The table has the median rate of
each, their ratio, and the share of one core that the reading process used. The last lines have the time of one
``submit``, and how much of it is spent before and after the kernel has the reads. Needs fio and Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from kvswap.disk import Slab, kv_folder, prepare_dir, probe_direct
from kvswap.disk.uring_backend import UringBackend
from kvswap.units import KIB, MIB, format_rate, parse_bytes

DEPTH = 64
TICKETS = 16
"""Submissions in flight, each with DEPTH / TICKETS reads, so that there are as many buffers as fio has.

With more target memory the same disk is slower, because virtual disks copy through the processor's cache.
"""


def fio_turn(path: Path, read_bytes: int, seconds: float, seed: int) -> tuple[float, float]:
    """Bytes per second and CPU share of one fio run."""
    command = ["fio", "--name=read", f"--filename={path}", "--rw=randread", "--direct=1", "--ioengine=io_uring"]
    command += [f"--bs={read_bytes}", f"--iodepth={DEPTH}", f"--runtime={seconds}", "--time_based", "--norandommap"]
    command += [f"--randseed={seed}", "--output-format=json", "--thread=0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    job = json.loads(done.stdout)["jobs"][0]
    return float(job["read"]["bw_bytes"]), (job["usr_cpu"] + job["sys_cpu"]) / 100


def our_turn(
    backend: UringBackend, slab: Slab, file: int, units: int, read_bytes: int, seconds: float
) -> tuple[float, float]:
    """Bytes per second and CPU share of kvswap's backend with TICKETS submissions in flight."""
    rng = np.random.default_rng()
    count = DEPTH // TICKETS
    files, lengths = np.full(count, file, dtype=np.int64), np.full(count, read_bytes, dtype=np.int64)
    places = [slab.address + (turn * count + np.arange(count)) * read_bytes for turn in range(TICKETS)]
    used, started = _cpu_s(), time.perf_counter()
    flying: deque[int] = deque()
    arrived, turn = 0, 0
    while time.perf_counter() - started < seconds:
        if len(flying) == TICKETS:
            backend.wait(flying.popleft())
            arrived += count
        flying.append(
            backend.submit(files, rng.integers(0, units, count) * read_bytes, lengths, places[turn % TICKETS])
        )
        turn += 1
    for ticket in flying:
        backend.wait(ticket)
        arrived += count
    elapsed = time.perf_counter() - started
    return arrived * read_bytes / elapsed, (_cpu_s() - used) / elapsed


def submit_overhead(backend: UringBackend, slab: Slab, file: int, count: int) -> dict[str, float]:
    """Median microseconds of one submit of ``count`` reads: in all, and outside of the ring's own submit."""
    files, lengths = np.full(count, file, dtype=np.int64), np.full(count, 4096, dtype=np.int64)
    places = slab.address + np.arange(count) * 4096
    offsets = np.random.default_rng(0).permutation(count) * 4096
    ring_submit, inside = backend._ring.submit, [0.0]

    def timed_submit(*arguments: Any) -> int:
        started = time.perf_counter()
        code = ring_submit(*arguments)
        inside[0] = time.perf_counter() - started
        return code

    backend._ring.submit = timed_submit  # type: ignore[method-assign]
    whole, python = [], []
    for _ in range(500):
        started = time.perf_counter()
        ticket = backend.submit(files, offsets, lengths, places)
        whole.append(time.perf_counter() - started)
        python.append(whole[-1] - inside[0])
        backend.wait(ticket)
    del backend._ring.submit
    return {"submit_us": statistics.median(whole) * 1e6, "python_us": statistics.median(python) * 1e6}


def measure(folder: Path, size_bytes: int, seconds: float, turns: int) -> dict[str, object]:
    probe = probe_direct(folder)
    if not probe.ok:
        sys.exit(f"no direct I/O: {probe.reason}")
    result: dict[str, object] = {"machine": platform.platform(), "cpus": os.cpu_count(), "filesystem": probe.filesystem}
    result |= {"depth": DEPTH, "size_bytes": size_bytes, "turns": turns, "seconds": seconds, "rows": []}
    slab = Slab(8 * MIB)
    with (
        tempfile.NamedTemporaryFile(dir=folder) as named,
        contextlib.closing(_backend(folder, probe, named.name)) as ours,
    ):
        path = Path(named.name)
        _fill(ours, slab, size_bytes)
        for read_bytes in (16 * KIB, 64 * KIB):
            units = size_bytes // read_bytes
            pairs = []
            for turn in range(turns):
                fio = fio_turn(path, read_bytes, seconds, turn + 1)
                pairs.append((fio, our_turn(ours, slab, 0, units, read_bytes, seconds)))
            result["rows"].append(_row(read_bytes, pairs))  # type: ignore[attr-defined]
        result["overhead"] = {str(count): submit_overhead(ours, slab, 0, count) for count in (20, 50, 64)}
    return result


def _backend(folder: Path, probe: object, name: str) -> UringBackend:
    """A backend whose file 0 is the named file that fio reads as well."""
    backend = UringBackend(folder, 4096, DEPTH)
    backend.open(4096)
    os.dup2(os.open(name, os.O_RDWR | os.O_DIRECT), int(backend._fds[0]))
    return backend


def _fill(backend: UringBackend, slab: Slab, size_bytes: int) -> None:
    part = slab.array[: 4 * MIB]
    rng = np.random.default_rng(0)
    for offset in range(0, size_bytes, part.nbytes):
        part[:] = np.frombuffer(rng.bytes(part.nbytes), dtype=np.uint8)
        backend.write(0, offset, part)


def _row(read_bytes: int, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, float]:
    fio, ours = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    row = {"read_bytes": read_bytes, "fio_bytes_per_s": fio, "ours_bytes_per_s": ours, "ratio": ours / fio}
    row |= {
        name: statistics.median(pair[side][1] for pair in pairs) for side, name in enumerate(("fio_cpu", "ours_cpu"))
    }
    ratios = [pair[1][0] / pair[0][0] for pair in pairs]
    return row | {"ratio_min": min(ratios), "ratio_max": max(ratios)}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="folder for the file (the user's cache folder)")
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")
    parser.add_argument("--size", type=parse_bytes, default=512 * MIB)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    folder = prepare_dir(kv_folder(options.dir))
    result = measure(folder, options.size, options.seconds, options.turns)
    print(f"{'read':>8} {'fio':>10} {'kvswap':>10} {'ratio':>6} {'min..max':>12} {'fio cpu':>8} {'our cpu':>8}")
    for row in result["rows"]:  # type: ignore[attr-defined]
        rates = f"{format_rate(row['fio_bytes_per_s']):>10} {format_rate(row['ours_bytes_per_s']):>10}"
        spread = f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}"
        cpu = f"{row['fio_cpu']:>8.0%} {row['ours_cpu']:>8.0%}"
        print(f"{row['read_bytes'] // KIB:>4} KiB {rates} {row['ratio']:>6.2f} {spread:>12} {cpu}")
    for count, cost in result["overhead"].items():  # type: ignore[attr-defined]
        print(f"submit of {count} reads: {cost['submit_us']:.1f} us, {cost['python_us']:.1f} us of it Python")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
