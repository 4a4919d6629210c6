"""How bytes are read from disk and written to it: folders, backends, write queue, atomic files. Imports no torch."""

from kvswap.disk.backend import ReadBackend, ReadCounters
from kvswap.disk.choose_backend import create_backend
from kvswap.disk.direct import DirectProbe, probe_direct
from kvswap.disk.files import check_free, free_bytes, prepare_dir
from kvswap.disk.folders import kv_folder
from kvswap.disk.memory_backend import Faults, MemoryBackend
from kvswap.disk.slab import Slab
from kvswap.disk.write_behind import WriteBehind

__all__ = [
    "DirectProbe",
    "Faults",
    "MemoryBackend",
    "ReadBackend",
    "ReadCounters",
    "Slab",
    "WriteBehind",
    "check_free",
    "create_backend",
    "free_bytes",
    "kv_folder",
    "prepare_dir",
    "probe_direct",
]
