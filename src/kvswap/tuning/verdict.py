"""From what was found to what kvswap will do and what would make it better. Values in, values out."""

from __future__ import annotations

from dataclasses import dataclass

from kvswap.units import GIB, format_bytes, format_rate

SLOW_BYTES_PER_S = 150e6
"""Below this for 64 KiB reads, reading is what a token waits for, also for a small model."""
LITTLE_FREE_BYTES = 4 * GIB

_WAYS = {
    "uring": "io_uring with direct I/O",
    "threads": "threads with direct I/O",
    "buffered": "the page cache, without direct I/O",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``summary``: what kvswap will use in this folder. ``advice``: what to do; empty when all is well."""

    summary: str
    advice: tuple[str, ...]


def judge(
    *,
    backend: str,
    direct_io: bool,
    direct_io_reason: str,
    uring_reason: str,
    free_bytes: int,
    read_bytes_per_s: float | None,
    read_test_reason: str,
    gpu_note: str,
) -> Verdict:
    """``read_bytes_per_s`` is the disk's own rate for 64 KiB reads, None where it is not known."""
    rate = f", {format_rate(read_bytes_per_s)} at random" if read_bytes_per_s else ""
    advice = []
    if not direct_io:
        advice.append(
            f"direct I/O is refused ({direct_io_reason}), so memory outside the limit is used and the read test says "
            "nothing about the disk: choose a folder on a local disk (ext4, xfs, btrfs) with --kv-dir"
        )
    if uring_reason and direct_io:
        advice.append(_allow_uring(uring_reason))
    if read_test_reason:
        advice.append(f"the read test failed ({read_test_reason}): check the disk, or choose another with --kv-dir")
    if read_bytes_per_s is not None and read_bytes_per_s < SLOW_BYTES_PER_S:
        advice.append(
            f"the disk is slow at random reads ({format_rate(read_bytes_per_s)}), so tokens will wait for it: choose a "
            "folder on an SSD with --kv-dir"
        )
    if free_bytes < LITTLE_FREE_BYTES:
        advice.append(
            f"{format_bytes(free_bytes)} of free space hold short contexts only: free some, or choose another disk "
            "with --kv-dir"
        )
    if gpu_note:
        advice.append(f"{gpu_note}: install PyTorch for it if the model shall run there")
    return Verdict(summary=f"kvswap will read through {_WAYS[backend]}{rate}", advice=tuple(advice))


def _allow_uring(reason: str) -> str:
    what = f"io_uring cannot be used ({reason}) and threads are slower"
    if reason.startswith("EPERM"):
        return (
            f"{what}: allow it in the container's seccomp profile, or with sysctl kernel.io_uring_disabled=0 "
            "on the machine"
        )
    if reason.startswith("ENOMEM"):
        return f"{what}: raise the limit on locked memory (ulimit -l)"
    if reason.startswith("ENOSYS"):
        return f"{what}: it needs Linux 5.15 or newer"
    return what
