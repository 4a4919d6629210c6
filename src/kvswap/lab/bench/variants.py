"""A method with a configuration of its own, ``kvswap@tuned.json``, to stand beside others in one benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.config import Config
from kvswap.errors import ConfigError
from kvswap.lab.rivals.registry import DISK, check_name
from kvswap.tuning.solution import TunedConfig, is_tuned, load_tuned

MARK = "@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """``name`` is ``method@stem``. ``source``: what its file holds; ``overrides`` come from the command line."""

    name: str
    method: str
    file: Path
    source: Config | TunedConfig
    overrides: dict[str, Any]

    @property
    def stem(self) -> str:
        """What the file is called."""
        return self.name.partition(MARK)[2]

    def config(self, place: dict[str, int]) -> Config:
        """The configuration for ``batch`` sequences of ``context`` tokens."""
        source = self.source
        if isinstance(source, TunedConfig):
            source = source.config(batch=place["batch"], context_tokens=place["context"])
        return source.replace(**self.overrides)

    def check_model(self, fingerprint: str) -> None:
        """Raise ConfigError where the file was tuned for a model of another fingerprint."""
        if isinstance(self.source, TunedConfig):
            try:
                self.source.check_model(fingerprint)
            except ConfigError as error:
                raise ConfigError(f"{self.name}: {error.message}", hint=error.hint) from error

    def identity(self) -> Any:
        """What must be the same for results under this name to stand in one file."""
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
    """Keys whose values are not the defaults, as JSON has them; the folder apart, which is the same for all methods."""
    plain = Config().to_dict()
    values = {key: value for key, value in config.to_dict().items() if key != "kv_dir" and value != plain[key]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def read_variants(
    methods: Iterable[str], *, kv_memory: str | None, kv_dir: str | None
) -> tuple[list[str], list[Variant]]:
    """Names of the methods as results have them, and the variants among them.

    ``kv_memory`` holds for all where it is given. Raises ConfigError for an unknown method, a file that is no
    configuration, or two files that would go by one name.
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
                f"--methods: {other.file} and {found.file} would both be called {found.stem}",
                hint="rename one of the files",
            )
        if found.name not in names:
            names.append(found.name)
            variants.append(found)
    return list(dict.fromkeys(names)), variants


def _read(text: str, method: str, path: str, overrides: dict[str, Any]) -> Variant:
    if method not in DISK:
        raise ConfigError(f"--methods {text}: {method} has no settings", hint=f"use one of {', '.join(DISK)}")
    if not path:
        raise ConfigError(f"--methods {text}: no file after {MARK}", hint=f"write for example {method}@tuned.json")
    file = Path(path).expanduser()
    name = f"{method}{MARK}{file.stem}"
    try:
        source = load_tuned(file) if is_tuned(file) else Config.from_file(file)
        found = Variant(name=name, method=method, file=file.resolve(), source=source, overrides=overrides)
        found.identity()  # raises where the options do not go with the file
    except ConfigError as error:
        raise ConfigError(f"--methods {text}: {error.message}", hint=error.hint) from error
    return found
