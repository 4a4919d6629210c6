"""What this machine is: processor, memory and its limit, accelerator, system and versions. Nothing is measured.

Torch is loaded only where an accelerator is looked for, and not even there when it is a build without any.
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
    """The accelerator that torch would use. ``name`` is empty where there is none, and ``note`` then says why.

    ``memory_bytes`` is None where the accelerator shares the machine's memory or does not tell.
    """

    name: str = ""
    kind: str = ""
    memory_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of one machine, as this process sees them.

    ``cores`` are those this process may run on. ``memory_available_bytes`` respects the limit of its cgroup,
    ``memory_limit_bytes`` is None where that does not bind. ``packages``: name to version, empty when not installed.
    ``compiled_loops``: whether ``kvswap.native`` was compiled when this was installed.
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
    """Look at this machine; never raises for something that cannot be found out."""
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
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version_of(package: str) -> str:
    """Version of an installed package without loading it; empty when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_gpu() -> Gpu:
    """The accelerator that torch would use here."""
    present = _gpu_hardware()
    version = version_of("torch")
    if not version:
        return Gpu(note="PyTorch is not installed")
    if version.endswith("+cpu"):
        return Gpu(note=f"{present}, but this PyTorch ({version}) is built without GPUs" if present else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old driver is a warning; the note below says what follows from it
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
    """What the system shows of an accelerator, whether or not torch can use it."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvhost-gpu").exists() or Path("/dev/nvgpu").exists():
        return "an NVIDIA GPU is there"
    return "an AMD GPU is there" if Path("/dev/kfd").exists() else ""


def _cpu_name(cpuinfo: str) -> str:
    """Name of the processor, of the board where the processor has none, at least the architecture."""
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    board = _text("/proc/device-tree/model").rstrip("\0").strip()
    return name[1].strip() if name else board or platform.processor() or platform.machine()


def _system() -> str:
    """Name of the distribution or system for people."""
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
