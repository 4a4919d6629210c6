"""Describe this machine: processor, memory and its limit, accelerator, system and versions. Nothing is measured.

``kvswap doctor``, profiles and results files carry this description. Torch is loaded only to look for an accelerator,
and not at all when the installed build supports none. Any thread may call.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from kvswap.memory.available import system_memory
from kvswap.native.library import library
from kvswap.native.processor import has_bfloat16, sysctl

PACKAGES = ("kvswap", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The accelerator that torch would use.

    ``name`` is empty where there is none; ``note`` may then say why. ``memory_bytes`` is None where the accelerator
    shares the machine's memory or does not report its own.
    """

    name: str = ""
    kind: str = ""
    memory_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of one machine, as this process sees them.

    Parameters
    ----------
    cores
        Processor cores that this process may use.
    memory_available_bytes
        Available memory under the limit of this process's cgroup.
    memory_limit_bytes
        The cgroup's limit, or None where it is not below the machine's memory.
    packages
        Versions by package name; empty where a package is not installed.
    compiled_loops
        Whether the C extension ``kvswap.native`` was compiled at installation.
    """

    cores: int
    cpu: str
    cpu_bf16: bool
    memory_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None
    gpu: Gpu
    system: str
    kernel: str
    architecture: str
    python: str
    packages: dict[str, str]
    compiled_loops: bool


def describe_machine() -> Machine:
    """Describe this machine. What cannot be found out is left empty; nothing is raised for it."""
    memory = system_memory()
    cpuinfo = _text("/proc/cpuinfo")
    return Machine(
        cores=cores(),
        cpu=_cpu_name(cpuinfo),
        cpu_bf16=has_bfloat16(),
        memory_bytes=memory.total_bytes,
        memory_available_bytes=memory.available_bytes,
        memory_limit_bytes=memory.limit_bytes,
        gpu=find_gpu(),
        system=_system(),
        kernel=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        python=platform.python_version(),
        packages={name: version_of(name) for name in PACKAGES},
        compiled_loops=library() is not None,
    )


def cores() -> int:
    """Count the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version_of(package: str) -> str:
    """Return the version of an installed package without loading it, or an empty string where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_gpu() -> Gpu:
    """Find the accelerator that torch would use here."""
    present = _gpu_hardware()
    version = version_of("torch")
    if not version:
        return Gpu(note="PyTorch is not installed")
    if version.endswith("+cpu"):
        return Gpu(note=f"{present}, but this PyTorch ({version}) is built without GPUs" if present else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about an old driver; the note below reports it instead
            found = _torch_gpu()
    except (ImportError, OSError, RuntimeError) as error:
        return Gpu(note=f"PyTorch fails: {error}")
    return found or Gpu(note=f"{present}, but PyTorch {version} cannot use it" if present else "")


def _torch_gpu() -> Gpu | None:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return Gpu(name=device.name, kind="rocm" if torch.version.hip else "cuda", memory_bytes=device.total_memory)
    if torch.backends.mps.is_available():
        return Gpu(name=f"{_cpu_name('')} (shared memory)", kind="mps")
    if torch.xpu.is_available():
        intel = torch.xpu.get_device_properties(0)
        return Gpu(name=intel.name, kind="xpu", memory_bytes=intel.total_memory)
    return None


def _gpu_hardware() -> str:
    """What the system reports about an accelerator, whether or not torch can use it."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvhost-gpu").exists() or Path("/dev/nvgpu").exists():
        return "an NVIDIA GPU is there"
    return "an AMD GPU is there" if Path("/dev/kfd").exists() else ""


def _cpu_name(cpuinfo: str) -> str:
    """Name of the processor; where it has none, the name of the board, else the architecture."""
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    board = _text("/proc/device-tree/model").rstrip("\0").strip()
    return name[1].strip() if name else board or platform.processor() or platform.machine()


def _system() -> str:
    """Human-readable name of the distribution or operating system."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
