"""Run a command with a disk that the kernel slows down, to measure what a slower disk would give (Linux, as root).

    python benchmarks/throttle.py --emmc -- kvswap bench ...       250 MB/s, 8,000 reads/s
    python benchmarks/throttle.py --sd -- kvswap bench ...          90 MB/s, 3,000 reads/s
    python benchmarks/throttle.py --read-mbps 500 --read-iops 20000 --dir /data -- COMMAND

The limits apply to direct reads of the disk under --dir (default: the current folder), by the command and all processes
it starts. Reads from the page cache are not slowed. MB is 10^6 bytes. The script uses control groups of version 2
(io.max) or version 1 (blkio), whichever the system has. The exit code is the command's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

PRESETS = {"emmc": (250, 8000), "sd": (90, 3000)}
ROOT = Path("/sys/fs/cgroup")


def disk_of(folder: str) -> str:
    """Return ``major:minor`` of the whole disk of a folder, because the kernel refuses limits on partitions."""
    number = os.stat(folder).st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        fail(f"{folder} is on no block device (network or overlay file system)")
    real = entry.resolve()
    whole = real.parent if (real / "partition").exists() else real
    return (whole / "dev").read_text().strip()


def make_group(device: str, read_bytes_per_s: int, reads_per_s: int) -> Path:
    """Create a control group with the limits; return its folder."""
    name = f"kvswap-throttle-{os.getpid()}"
    if (ROOT / "cgroup.controllers").exists():
        if "io" not in (ROOT / "cgroup.controllers").read_text().split():
            fail("the kernel offers no io controller here")
        write(ROOT / "cgroup.subtree_control", "+io")
        group, limits = ROOT / name, {"io.max": f"{device} rbps={read_bytes_per_s} riops={reads_per_s}"}
    elif (ROOT / "blkio").is_dir():
        group = ROOT / "blkio" / name
        limits = {
            "blkio.throttle.read_bps_device": f"{device} {read_bytes_per_s}",
            "blkio.throttle.read_iops_device": f"{device} {reads_per_s}",
        }
    else:
        fail("no control groups here: neither io (version 2) nor blkio (version 1)")
    try:
        group.mkdir()
    except OSError as error:
        fail(f"{group} cannot be created: {error.strerror}")
    try:
        for file, line in limits.items():
            write(group / file, line)
    except SystemExit:
        group.rmdir()
        raise
    return group


def write(file: Path, line: str) -> None:
    """Write a line to a kernel file, or end with what it refused."""
    try:
        file.write_text(line + "\n")
    except OSError as error:
        fail(f"{file} refuses {line!r}: {error.strerror}; run as root, outside of a container without that right")


def fail(reason: str) -> None:
    """End with one line."""
    sys.exit(f"throttle: not possible here: {reason}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (rate, reads) in PRESETS.items():
        help_text = f"{rate} MB/s, {reads:,} reads/s"
        parser.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=help_text)
    parser.add_argument("--read-mbps", type=int)
    parser.add_argument("--read-iops", type=int)
    parser.add_argument("--dir", default=".")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    rate, reads = PRESETS.get(args.preset, (None, None))
    rate, reads = args.read_mbps or rate, args.read_iops or reads
    if not command or rate is None or reads is None:
        parser.error("give --emmc, --sd, or --read-mbps and --read-iops; then -- and a command")
    if sys.platform != "linux":
        fail("it needs Linux")
    if os.geteuid() != 0:
        fail("it needs root")
    group = make_group(disk_of(args.dir), rate * 1_000_000, reads)
    try:
        process = subprocess.Popen(command, preexec_fn=lambda: write(group / "cgroup.procs", str(os.getpid())))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()
    finally:
        group.rmdir()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
