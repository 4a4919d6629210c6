"""``kvswap doctor``: examine this machine and a folder for KV files. Loads no model and leaves nothing on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from kvswap.tuning.checkup import Checkup, Folder
    from kvswap.tuning.machine import Machine
    from kvswap.tuning.measure_disk import ReadRate, ReadTest

Row = tuple[str, str]


@click.command()
@click.option("--kv-dir", metavar="DIR", help="Folder for KV files to examine.  [default: the user's cache folder]")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write the findings to this file as JSON.",
)
def doctor(kv_dir: str | None, json_file: Path | None) -> None:
    """Examine this machine and the folder for KV files, with a read test of three seconds.

    It reports what kvswap will use there, and what to do where something can be improved. It loads no model and leaves
    no file.

    \b
    Examples:
      kvswap doctor
      kvswap doctor --kv-dir /data/kv --json doctor.json
    """
    from rich.console import Console

    from kvswap.disk.folders import user_path
    from kvswap.disk.json_files import write_json
    from kvswap.errors import ConfigError
    from kvswap.tuning.checkup import check_up

    if json_file is not None:
        json_file = user_path(json_file)
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigError(
            f"--json {json_file}: not a file in an existing folder",
            hint="give a file in an existing folder",
        )
    with Console(stderr=True).status("examining the machine and reading from the disk, about 6 s"):
        found = check_up(kv_dir)
    _show(Console(highlight=False), found)
    if json_file is not None:
        try:
            write_json(json_file, found.to_dict())
        except OSError as error:
            raise ConfigError(
                f"--json {json_file}: cannot be written: {error.strerror}", hint="give a file in a writable folder"
            ) from error


def _show(console: Console, found: Checkup) -> None:
    sections = (
        ("Machine", _machine_rows(found.machine)),
        ("Folder", _folder_rows(found.folder)),
        ("Read test", _test_rows(found.read_test, found.read_test_reason)),
        ("Verdict", _verdict_rows(found)),
    )
    width = max(len(label) for _, rows in sections for label, _ in rows)
    for title, rows in sections:
        console.print(title, style="bold", markup=False)
        for label, value in rows:
            _show_row(console, label.ljust(width), value)


def _show_row(console: Console, label: str, value: str) -> None:
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:  # one line for each row, for grep and logs
        console.print(f"  {label}  {value}", markup=False, soft_wrap=True)
        return
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(f"  {label}", style="dim"), Text(value))
    console.print(line)


def _machine_rows(machine: Machine) -> list[Row]:
    from kvswap.units import format_bytes

    gpu, limit = machine.gpu, machine.memory_limit_bytes
    memory = f", {format_bytes(gpu.memory_bytes)}" if gpu.memory_bytes is not None else ""
    note = f" ({gpu.note})" if gpu.note else ""
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in machine.packages.items())
    return [
        ("processor", f"{machine.cpu}, {machine.architecture}"),
        ("cores", f"{machine.cores}"),
        ("bf16", "yes" if machine.cpu_bf16 else "no: models run in float32 on this processor"),
        ("memory", f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.memory_available_bytes)} available"),
        ("memory limit", f"{format_bytes(limit)} (cgroup)" if limit is not None else "none"),
        ("GPU", (f"{gpu.name}, {gpu.kind}{memory}" if gpu.name else "none") + note),
        ("system", f"{machine.system}, {machine.kernel}"),
        ("Python", machine.python),
        ("packages", packages),
        ("compiled loops", "yes" if machine.compiled_loops else "no (slower): the installation found no C compiler"),
    ]


def _folder_rows(folder: Folder) -> list[Row]:
    from kvswap.units import format_bytes

    alignment = f"{folder.offset_alignment_bytes} bytes on disk, {folder.memory_alignment_bytes} in memory"
    return [
        ("path", folder.path),
        ("file system", folder.filesystem),
        ("free space", format_bytes(folder.free_bytes)),
        ("direct I/O", _works(folder.direct_io_works, folder.direct_io_reason)),
        ("io_uring", _works(folder.uring_works, folder.uring_reason)),
        ("alignment", alignment if folder.direct_io_works else "not needed without direct I/O"),
    ]


def _works(works: bool, reason: str) -> str:
    return "works" if works else f"does not work: {reason}"


def _test_rows(test: ReadTest | None, reason: str) -> list[Row]:
    from kvswap.units import format_bytes, format_rate

    if test is None:
        return [("not run", reason)]
    where = "from the page cache, NOT the disk" if test.page_cache else "direct, bypassing the page cache"
    single = test.single
    latency = f"{single.latency_p50_us:.0f} us median, {single.latency_p99_us:.0f} us p99"
    return [
        ("file", f"{format_bytes(test.file_bytes)}, random reads, {where}"),
        (_name(test.small), _rate(test.small)),
        (_name(test.large), _rate(test.large)),
        (_name(single), f"{_rate(single)}; {latency}"),
        ("writing", f"{format_rate(test.write_bytes_per_s)}, one write of 1 MiB at a time"),
    ]


def _name(rate: ReadRate) -> str:
    from kvswap.units import KIB

    return f"{rate.read_bytes // KIB} KiB, depth {rate.depth}"


def _rate(rate: ReadRate) -> str:
    from kvswap.units import format_rate

    return f"{format_rate(rate.bytes_per_s)}, {rate.reads_per_s:,.0f} reads/s"


def _verdict_rows(found: Checkup) -> list[Row]:
    advice = found.verdict.advice
    return [("result", found.verdict.summary), *(("to do", text) for text in advice)] + (
        [] if advice else [("to do", "nothing: no problem was found")]
    )
