"""JSON files: replaced in one move so that a reader never sees half of one, and checked when read."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from kvswap.disk.atomic import atomic_write
from kvswap.errors import ConfigError

T = TypeVar("T")


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` to ``target``, which is replaced in one move. Raises OSError."""
    atomic_write(target, (json.dumps(content, indent=2) + "\n").encode())


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` to a file that a user named. Raises ConfigError when that cannot be."""
    target = Path(path).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, content)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}", hint="give a file in a folder of yours"
        ) from error


def read_json(path: str | Path, *, kind: str, version: int, command: str) -> dict[str, Any]:
    """The object in a file of ``write_json`` with ``format`` and ``version`` as wanted. Raises ConfigError.

    ``command`` is what makes such a file.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"damaged JSON: {error}"
        raise ConfigError(f"{path}: {reason}", hint=f"give a file that `{command}` wrote") from error
    if not isinstance(values, dict) or values.get("format") != kind:
        raise ConfigError(f"{path}: not a {kind} file", hint=f"give a file that `{command}` wrote")
    if values.get("version") != version:
        raise ConfigError(
            f"{path}: version {values.get('version')!r}, this kvswap reads {version}", hint=f"run `{command}` again"
        )
    return values


def read_results(
    file: Path, empty: dict[str, Any], *, kind: str, older: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The object in a results file that is to be continued; ``empty`` where there is no file.

    ``older``: objects of the identity that may lack keys in files of before, with what such a key then meant.

    Raises ConfigError for a file of something else: where ``format`` or ``identity`` are not those of ``empty``.
    """
    hint = "give another --json file, or delete this one"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except (OSError, ValueError) as error:
        raise ConfigError(f"results file {file}: {error}", hint=hint) from error
    if not isinstance(content, dict) or content.get("format") != empty["format"] or set(empty) - set(content):
        raise ConfigError(f"results file {file}: not {kind} of this version", hint=hint)
    if not isinstance(content["identity"], dict):
        raise ConfigError(f"results file {file}: damaged: identity", hint=hint)
    known = dict(content["identity"])
    for key, values in (older or {}).items():
        if isinstance(known.get(key), dict):
            known[key] = {**values, **known[key]}
    other = [key for key, value in empty["identity"].items() if known.get(key) != value]
    if other:
        raise ConfigError(f"results file {file}: its {', '.join(other)} differ", hint=hint)
    return content


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from what JSON made of it; names and types are checked. Raises ConfigError."""
    if not isinstance(values, dict):
        raise _damaged(where, f"{cls.__name__} is no object")
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(values) != names:
        odd = ", ".join(sorted(set(values) ^ names))
        raise _damaged(where, f"{cls.__name__} lacks or has too much of: {odd}")
    return cls(**{name: _value(hints[name], values[name], f"{where}: {name}") for name in names})


def _value(wanted: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(next(each for each in inner if each is not type(None)), value, where)
    if dataclasses.is_dataclass(wanted):
        return build(typing.cast(type, wanted), value, where)
    if origin is list and isinstance(value, list):
        return [_value(inner[0], each, where) for each in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _value(inner[1], each, where) for key, each in value.items()}
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    raise _damaged(where, f"{value!r:.40} is no {getattr(wanted, '__name__', wanted)}")


def _damaged(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: damaged: {what}", hint="make the file anew")
