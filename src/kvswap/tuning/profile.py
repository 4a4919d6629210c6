"""A profile: what this machine, this folder and, if asked for, this model cost, as a versioned file.

``take_profile`` measures, ``load_profile`` reads one back and refuses that of another machine, model or version, since
its numbers would say nothing here.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvswap.disk import kv_folder, prepare_dir
from kvswap.disk.files import filesystem_of
from kvswap.disk.folders import profiles_folder
from kvswap.disk.json_files import build, read_json, save_json
from kvswap.errors import ConfigError
from kvswap.tuning.cost import DiskCosts, ModelCosts
from kvswap.tuning.disk_curve import Progress, measure_disk
from kvswap.tuning.machine import cores, describe_machine

if TYPE_CHECKING:
    from kvswap.models.loading import LoadedModel

FORMAT, VERSION = "kvswap-profile", 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a profile holds for. ``disk`` is the file system and the device number of the folder."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: str
    kernel: str
    disk: str
    packages: dict[str, str]

    def differences(self, other: Stamp) -> list[str]:
        """In words, what is not the same; the size of memory moves by what the system keeps and is left out."""
        found = []
        for name in ("cpu", "cores", "gpu", "kernel", "disk"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                found.append(f"{name} {its or 'none'} instead of {mine or 'none'}")
        for name in sorted(set(self.packages) | set(other.packages)):
            mine, its = self.packages.get(name, ""), other.packages.get(name, "")
            if mine != its:
                found.append(f"{name} {its or 'missing'} instead of {mine or 'missing'}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Which model, what of its shape the costs depend on, and torch's threads. ``layers`` are the offloaded ones."""

    name: str
    fingerprint: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    compute_itemsize_bytes: int
    store_itemsize_bytes: int
    longest_tokens: int
    threads: int

    @property
    def key_elements(self) -> int:
        """D."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """``disks``: the backend that ``auto`` takes first. ``model`` and ``costs`` are None without a model."""

    stamp: Stamp
    made: str
    disks: list[DiskCosts]
    model: ModelFacts | None
    costs: ModelCosts | None

    @property
    def disk(self) -> DiskCosts:
        """The backend that is used when nothing is said."""
        return self.disks[0]

    def save(self, path: str | Path) -> None:
        """Write as JSON. Raises ConfigError."""
        save_json(path, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})


def stamp_of(kv_dir: Path) -> Stamp:
    """This machine, and the disk of an existing folder."""
    machine = describe_machine()
    return Stamp(
        cpu=machine.cpu,
        cores=cores(),
        memory_bytes=machine.memory_bytes,
        gpu=machine.gpu.name,
        kernel=machine.kernel,
        disk=f"{filesystem_of(kv_dir)} {kv_dir.stat().st_dev}",
        packages=machine.packages,
    )


def take_profile(
    kv_dir: str | None,
    loaded: LoadedModel | None = None,
    *,
    on_progress: Progress | None = None,
) -> Profile:
    """Measure the disk of a folder and, when one is given, a model. Nothing stays on the disk.

    Raises StorageError, DiskError, ModelError.
    """
    folder = prepare_dir(kv_folder(kv_dir))
    disks = measure_disk(folder, on_progress=on_progress)
    facts, costs = None, None
    if loaded is not None:
        from kvswap.tuning.model_costs import measure_model  # loads torch, which a disk alone does not need

        facts, costs = measure_model(loaded, str(folder), on_progress=on_progress)
    made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Profile(stamp=stamp_of(folder), made=made, disks=disks, model=facts, costs=costs)


def load_profile(
    path: str | Path, kv_dir: str | None, facts: ModelFacts | None = None, *, force: bool = False
) -> Profile:
    """Read a profile that holds for this machine, the folder and, where given, the model of ``facts``.

    Raises ConfigError for a damaged file, and for one of elsewhere unless ``force``.
    """
    values = read_json(path, kind=FORMAT, version=VERSION, command="kvswap profile")
    fields = {key: value for key, value in values.items() if key not in ("format", "version")}
    profile = build(Profile, fields, str(path), hint="run `kvswap profile` again")
    if not profile.disks or any(not disk.bursts for disk in profile.disks):
        raise ConfigError(f"{path}: damaged: no read was measured", hint="run `kvswap profile` again")
    if force:
        return profile
    folder = prepare_dir(kv_folder(kv_dir))
    differences = stamp_of(folder).differences(profile.stamp)
    if facts is not None:
        differences += _other_model(profile.model, facts)
    if differences:
        raise ConfigError(
            f"{path}: measured elsewhere: {'; '.join(differences)}",
            hint="run `kvswap profile` here, or use it anyway with --force",
        )
    return profile


def _other_model(profiled: ModelFacts | None, facts: ModelFacts) -> list[str]:
    if profiled is None or profiled.fingerprint != facts.fingerprint:
        return [f"model {profiled.name if profiled else 'none'}"]
    same = profiled.threads == facts.threads
    return [] if same else [f"{profiled.threads} threads instead of {facts.threads}"]


def cached_path(fingerprint: str, kv_dir: str | None) -> Path:
    """Where the profile of a model and a folder is kept."""
    folder = prepare_dir(kv_folder(kv_dir))
    return profiles_folder() / f"{fingerprint[:24]}-{folder.stat().st_dev}.json"
