"""JSON files of kvswap: profiles, tuned configurations, results. Replaced in one move, and checked when read.

Files with a type (``read_json``, then ``build``) are checked by msgspec: strict JSON, and every value has the type that
its field states. Results are read by Python's own module, because a measured score may be NaN. Any thread. Errors are
ConfigErrors that say which file, which field, and what makes the file anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvswap.disk.atomic import atomic_write
from kvswap.disk.files import check_open_files
from kvswap.disk.folders import user_path
from kvswap.errors import ConfigError

T = TypeVar("T")


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` to ``target``, which is replaced in one move. Raises OSError."""
    atomic_write(target, (json.dumps(content, indent=2) + "\n").encode())


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` to a file that a user named. Raises ConfigError when that cannot be."""
    target = user_path(path).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, content)
    except OSError as error:
        check_open_files(error)
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}", hint="give a file in a folder of yours"
        ) from error


def read_json(path: str | Path, *, kind: str, version: int, command: str) -> dict[str, Any]:
    """The object in a file of ``write_json`` with ``format`` and ``version`` as expected. Raises ConfigError.

    ``command`` is what makes such a file.
    """
    try:
        values = msgspec.json.decode(user_path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
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

    ``older``: keys of the identity, and of objects in it, that files of before may lack, with what they then meant.

    Raises ConfigError for a file of something else: where ``format`` or ``identity`` are not those of ``empty``.
    """
    hint = "give another --json file, or delete this one"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"results file {file}: {error}", hint=hint) from error
    if not isinstance(content, dict) or content.get("format") != empty["format"] or set(empty) - set(content):
        raise ConfigError(f"results file {file}: not {kind} of this version", hint=hint)
    if not isinstance(content["identity"], dict):
        raise ConfigError(f"results file {file}: damaged: identity", hint=hint)
    known = dict(content["identity"])
    for key, values in (older or {}).items():
        if isinstance(values, dict) and isinstance(known.get(key), dict):
            known[key] = {**values, **known[key]}
        elif not isinstance(values, dict):
            known.setdefault(key, values)
    other = [key for key, value in empty["identity"].items() if known.get(key) != value]
    if other:
        raise ConfigError(f"results file {file}: its {', '.join(other)} differ", hint=hint)
    return content


def build(cls: type[T], values: Any, where: str, *, hint: str = "make the file anew") -> T:
    """A dataclass from what JSON made of it. Names and types are checked, unknown names are refused.

    ``where`` is what the message begins with, such as the file; ``hint`` says what makes it anew. Raises ConfigError.
    """
    try:
        found = msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: damaged: {error}", hint=hint) from error
    unknown = _unknown(values, msgspec.to_builtins(found), "$")
    if unknown:
        raise ConfigError(f"{where}: damaged: unknown: {', '.join(unknown)}", hint=hint)
    return found


def _unknown(values: Any, known: Any, place: str) -> list[str]:
    """Names in ``values`` that did not come to anything: msgspec passes over what a dataclass does not have."""
    if isinstance(values, dict):
        extra = [f"{place}.{name}" for name in values if name not in known]
        return extra + [each for name in known for each in _unknown(values[name], known[name], f"{place}.{name}")]
    if isinstance(values, list):
        pairs = enumerate(zip(values, known, strict=True))
        return [each for number, (one, other) in pairs for each in _unknown(one, other, f"{place}[{number}]")]
    return []
