"""Variants: methods with their own configuration, such as ``kvswap@tuned.json``, beside others in one benchmark.

A variant is written ``METHOD@FILE``; the file is a configuration or a result of ``kvswap tune``. In results it is named
``METHOD@STEM`` after the file name without its extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.config import Config
from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError
from kvswap.lab.rivals.registry import DISK, check_name
from kvswap.tuning.solution import TunedConfig, is_tuned, load_tuned

MARK = "@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method with its own configuration.

    ``name`` is ``method@stem``. ``source`` is the content of ``file``; ``overrides`` come from the command line.
    """

    name: str
    method: str
    file: Path
    source: Config | TunedConfig
    overrides: dict[str, Any]

    @property
    def stem(self) -> str:
        """Name of the file without its extension."""
        return self.name.partition(MARK)[2]

    def config(self, place: dict[str, int]) -> Config:
        """Return the configuration for ``place["batch"]`` sequences of ``place["context"]`` tokens."""
        source = self.source
        if isinstance(source, TunedConfig):
            source = source.config(batch=place["batch"], context_tokens=place["context"])
        return source.replace(**self.overrides)

    def check_model(self, fingerprint: str) -> None:
        """Raise ConfigError if the file was tuned for another model."""
        if isinstance(self.source, TunedConfig):
            try:
                self.source.check_model(fingerprint)
            except ConfigError as error:
                raise ConfigError(f"{self.name}: {error.message}", hint=error.hint) from error

    def identity(self) -> Any:
        """Return what must be equal for results under this name to share one file, ready for JSON."""
        if isinstance(self.source, Config):
            return changed(self.source.replace(**self.overrides))
        return [
            {
                "batch": each.batch,
                "context": each.context_tokens,
                "config": changed(each.config.replace(**self.overrides)),
            }
            for each in self.source.solutions
        ]


def changed(config: Config) -> dict[str, Any]:
    """Return the keys with other values than the defaults, ready for JSON. ``kv_dir`` is left out."""
    plain = Config().to_dict()
    values = {key: value for key, value in config.to_dict().items() if key != "kv_dir" and value != plain[key]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def read_variants(
    methods: Iterable[str], *, kv_memory: str | None, kv_dir: str | None
) -> tuple[list[str], list[Variant]]:
    """Return the names that methods have in results, and the variants among them.

    ``methods`` are names or ``METHOD@FILE``. ``kv_memory``, where given, overrides the limit of every file. Raises
    ConfigError for an unknown method, a file that is no configuration, and two files with the same stem.
    """
    names: list[str] = []
    variants: list[Variant] = []
    overrides = {"kv_dir": kv_dir} | ({"kv_memory": kv_memory} if kv_memory is not None else {})
    for text in methods:
        method, mark, path = text.partition(MARK)
        check_name(method)
        if not mark:
            names.append(text)
            continue
        found = _read(text, method, path, overrides)
        other = next((each for each in variants if each.stem == found.stem), None)
        if other is not None and other.file != found.file:
            raise ConfigError(
                f"--methods: {other.file} and {found.file} would both be called {found.stem} in the results",
                hint="rename one of the files",
            )
        if found.name not in names:
            names.append(found.name)
            variants.append(found)
    return list(dict.fromkeys(names)), variants


def _read(text: str, method: str, path: str, overrides: dict[str, Any]) -> Variant:
    if method not in DISK:
        raise ConfigError(f"--methods {text}: {method} has no configuration", hint=f"use one of {', '.join(DISK)}")
    if not path:
        raise ConfigError(f"--methods {text}: no file after {MARK}", hint=f"write for example {method}@tuned.json")
    file = user_path(path)
    name = f"{method}{MARK}{file.stem}"
    try:
        source = load_tuned(file) if is_tuned(file) else Config.from_file(file)
        found = Variant(name=name, method=method, file=file.resolve(), source=source, overrides=overrides)
        found.identity()  # raises where the command line's options contradict the file
    except ConfigError as error:
        raise ConfigError(f"--methods {text}: {error.message}", hint=error.hint) from error
    return found
