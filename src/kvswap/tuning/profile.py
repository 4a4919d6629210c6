"""The profile: measured costs of this machine's disk and, if requested, of one model, as a versioned JSON file.

``take_profile`` measures. ``load_profile`` reads a file back and refuses one from another machine, model or version,
because its numbers would be wrong here. ``kvswap profile`` and ``kvswap tune`` call both. One thread.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvswap.disk import kv_folder, prepare_dir
from kvswap.disk.files import filesystem_of
from kvswap.disk.folders import profiles_folder
from kvswap.disk.json_files import build, read_json, save_json
from kvswap.errors import ConfigError
from kvswap.tuning.cost import DiskCosts, ModelCosts, ModelFacts
from kvswap.tuning.machine import cores, describe_machine
from kvswap.tuning.measure_disk import Progress, measure_disk

if TYPE_CHECKING:
    from kvswap.models.loading import LoadedModel

FORMAT, VERSION = "kvswap-profile", 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The conditions that a profile is valid for. ``disk`` is the folder's file system and device number."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: str
    kernel: str
    disk: str
    packages: dict[str, str]

    def differences(self, other: Stamp) -> list[str]:
        """Describe in words what differs. Memory size is not compared: the system reserves a varying part of it."""
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
class Profile:
    """Measured costs.

    ``made`` is the time of measurement. ``disks`` has one entry for each backend; the first is the one that
    ``backend="auto"`` chooses. ``model`` and ``costs`` are None when no model was measured.
    """

    stamp: Stamp
    made: str
    disks: list[DiskCosts]
    model: ModelFacts | None
    costs: ModelCosts | None

    @property
    def disk(self) -> DiskCosts:
        """Costs of the backend that ``backend="auto"`` chooses."""
        return self.disks[0]

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON. Raises ConfigError when the file cannot be written."""
        save_json(path, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})


def stamp_of(kv_dir: Path) -> Stamp:
    """Describe this machine and the disk of an existing folder."""
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
    """Measure the disk of a folder and, where ``loaded`` is given, a model. Nothing remains on the disk.

    ``kv_dir`` None means the default folder. Raises StorageError, DiskError and ModelError.
    """
    folder = prepare_dir(kv_folder(kv_dir))
    disks = measure_disk(folder, on_progress=on_progress)
    facts, costs = None, None
    if loaded is not None:
        from kvswap.tuning.measure_model import measure_model  # loads torch, which a disk alone does not need

        facts, costs = measure_model(loaded, str(folder), on_progress=on_progress)
    made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Profile(stamp=stamp_of(folder), made=made, disks=disks, model=facts, costs=costs)


def load_profile(
    path: str | Path, kv_dir: str | None, facts: ModelFacts | None = None, *, force: bool = False
) -> Profile:
    """Read a profile that is valid for this machine, the folder and, where given, the model of ``facts``.

    Raises ConfigError for a damaged file and, unless ``force``, for a profile from another machine, disk or model.
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
    """Path of the cached profile of a model and a folder."""
    folder = prepare_dir(kv_folder(kv_dir))
    return profiles_folder() / f"{fingerprint[:24]}-{folder.stat().st_dev}.json"
