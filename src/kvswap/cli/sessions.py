"""``kvswap sessions``: list, check, repair, fork, export, import and remove stored contexts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.display import printable

if TYPE_CHECKING:
    from kvswap.sessions.catalog import Entry

_WIPE_LIMITS = (
    "Overwritten in place. Flash storage, and file systems that copy on write, may keep older copies that no program "
    "can reach; only encryption of the whole disk protects from somebody who takes the disk apart."
)


@click.group()
@click.option("--kv-dir", metavar="DIR", help="Folder for KV files.  [default: the user's cache folder]")
@click.pass_context
def sessions(context: click.Context, kv_dir: str | None) -> None:
    """Contexts that --session keeps on disk."""
    context.obj = kv_dir


def _path(context: click.Context, name: str) -> Path:
    from kvswap.sessions.catalog import session_path

    return session_path(context.obj, name)


@sessions.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List all sessions with their tokens and the disk they take."""
    from kvswap.sessions.catalog import entries, sessions_dir, used_bytes
    from kvswap.sessions.check import quarantined
    from kvswap.units import format_bytes

    root = sessions_dir(context.obj)
    found = entries(root)
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in found], indent=1))
        return
    if not found:
        _say(f"no sessions in {root}")
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        _say(f"{entry.name:{width}}  {_line(entry)}")
    for path in quarantined(root):
        _say(f"quarantine: {path}")
    if found:
        _say(f"{format_bytes(used_bytes(root))} of disk in all")


@sessions.command()
@click.argument("name")
@click.pass_context
def show(context: click.Context, name: str) -> None:
    """Show one session as JSON."""
    from kvswap.errors import DamagedError
    from kvswap.sessions.catalog import entry, open_store

    open_store(context.obj, name, write=False).close()  # raises where it cannot be used
    found = entry(_path(context, name))
    if found.manifest is None:
        raise DamagedError(found.problem, hint=f"kvswap sessions repair {name}")
    click.echo(json.dumps(_facts(found), indent=1))


@sessions.command()
@click.argument("names", nargs=-1)
@click.pass_context
def check(context: click.Context, names: tuple[str, ...]) -> int:
    """Read sessions, without a name all of them, and compare everything with its checksums."""
    from kvswap.errors import KVSwapError
    from kvswap.sessions.catalog import entries, open_store, sessions_dir
    from kvswap.sessions.check import check as check_store
    from kvswap.units import format_bytes

    wrong = 0
    for name in names or [entry.name for entry in entries(sessions_dir(context.obj))]:
        try:
            with open_store(context.obj, name, write=False) as store:
                report = check_store(store)
        except KVSwapError as error:
            if len(names) == 1:
                raise
            _say(str(error))
            wrong += 1
            continue
        if report.problems:
            wrong += 1
            _say(f"{name}: damaged")
            for problem in report.problems:
                _say(f"  {problem}")
            _say(f"  kvswap sessions repair {name} keeps what is undamaged")
        else:
            _say(f"{name}: sound, {report.groups:,} groups, {format_bytes(report.read_bytes)} read")
    return 1 if wrong else 0


@sessions.command()
@click.argument("name")
@click.pass_context
def repair(context: click.Context, name: str) -> None:
    """Go back to the longest undamaged context of a session; the damaged files stay in quarantine."""
    from kvswap.sessions.check import repair_session

    words, place = repair_session(_path(context, name))
    _say(f"{name}: {words}")
    if place is not None:
        _say(f"the damaged files are in {place}")


@sessions.command()
@click.argument("name")
@click.argument("new_name")
@click.pass_context
def fork(context: click.Context, name: str, new_name: str) -> None:
    """Create a second session that begins as the first one is now, over the same files."""
    from kvswap.sessions.catalog import open_store
    from kvswap.sessions.sharing import fork as fork_store
    from kvswap.units import format_bytes

    with open_store(context.obj, name) as store:
        new_bytes = fork_store(store, _path(context, new_name))
    _say(f"{new_name}: {format_bytes(new_bytes)} written, the rest is shared with {name}")


@sessions.command()
@click.argument("names", nargs=-1, required=True)
@click.pass_context
def rm(context: click.Context, names: tuple[str, ...]) -> None:
    """Remove sessions. Files that other sessions share stay with these."""
    from kvswap.sessions.catalog import remove

    for name in names:
        remove(_path(context, name))
        _say(f"{name}: removed")


@sessions.command()
@click.argument("names", nargs=-1, required=True)
@click.pass_context
def wipe(context: click.Context, names: tuple[str, ...]) -> None:
    """Overwrite sessions with zeros, then remove them. Files that other sessions share stay as they are."""
    from kvswap.sessions.catalog import remove
    from kvswap.units import format_bytes

    for name in names:
        _say(f"{name}: {format_bytes(remove(_path(context, name), wipe=True))} overwritten, then removed")
    _say(_WIPE_LIMITS)


@sessions.command()
@click.option("--keyring", is_flag=True, help="Store it in the system's keyring instead of printing it.")
def key(keyring: bool) -> None:
    """Make a new key for encrypted sessions. Without it they cannot be read again."""
    from kvswap.sessions.encryption import KEY_VARIABLE, new_key, store_in_keyring

    created = new_key()
    if keyring:
        store_in_keyring(created)
        _say("the keyring has a key now; sessions made with --encrypt take it from there")
    else:
        click.echo(created)
        click.echo(f"keep it where others cannot read it, and set {KEY_VARIABLE} to it", err=True)


@sessions.command()
@click.pass_context
@click.option("--quarantine", is_flag=True, help="Remove the damaged files that repairs have put aside as well.")
def prune(context: click.Context, quarantine: bool) -> None:
    """Remove leftovers of interrupted work, and empty sessions."""
    from kvswap.sessions.catalog import prune as prune_all
    from kvswap.sessions.catalog import sessions_dir
    from kvswap.sessions.check import remove_quarantined

    root = sessions_dir(context.obj)
    removed = [*prune_all(root), *(remove_quarantined(root) if quarantine else [])]
    for words in removed:
        _say(f"removed {words}")
    if not removed:
        _say("nothing to remove")


@sessions.command("export")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def export(context: click.Context, name: str, file: Path) -> None:
    """Write the current context of a session to one file, where its text can be read unless it is encrypted."""
    from kvswap.disk.folders import user_path
    from kvswap.sessions.catalog import open_store
    from kvswap.sessions.export_import import export_session
    from kvswap.units import format_bytes

    with open_store(context.obj, name) as store:
        _say(f"{file}: {format_bytes(export_session(store, user_path(file).absolute()))}")


@sessions.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the new session.  [default: the file's name without its ending]")
@click.pass_context
def import_(context: click.Context, file: Path, name: str | None) -> None:
    """Create a session from an exported file, after everything in it was checked."""
    from kvswap.disk.folders import user_path
    from kvswap.sessions.catalog import prepare_parent
    from kvswap.sessions.export_import import import_session

    path = _path(context, name or file.name.split(".")[0])
    prepare_parent(path)
    manifest = import_session(user_path(file).absolute(), path)
    tokens = manifest.current.tokens if manifest.current else 0
    _say(f"{path.name}: {tokens:,} tokens")


def _say(line: str) -> None:
    """Write one line to stdout. Names in it come from folders and manifests, which others may have written."""
    click.echo(printable(line))


def _facts(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    if manifest is None:
        return {"name": entry.name, "problem": entry.problem}
    current, model, layout = manifest.current, manifest.model, manifest.layout
    return {
        "name": entry.name,
        "tokens": current.tokens if current else 0,
        "model": model.name if model else None,
        "dtype": model.dtype if model else None,
        "store_dtypes": sorted(set(layout.dtypes)) if layout else [],
        "group_tokens": layout.group_tokens if layout else None,
        "sketch": f"{layout.sketch_kind} rank {layout.sketch_rank}, {layout.sketch_bits} bit" if layout else None,
        "encrypted": manifest.encryption is not None,
        "turns_back": max(0, len(manifest.checkpoints) - 1),
        "disk_bytes": entry.disk_bytes,
        "shared_bytes": entry.shared_bytes,
        "written_bytes": manifest.written_bytes,
        "created": _when(manifest.created),
        "used": _when(manifest.used),
        "in_use": entry.in_use,
        "folder": str(entry.path),
    }


def _line(entry: Entry) -> str:
    from kvswap.units import format_bytes

    facts = _facts(entry)
    if entry.manifest is None:
        return f"cannot be used: {entry.problem}"
    shared = f" + {format_bytes(entry.shared_bytes)} shared" if entry.shared_bytes else ""
    busy = (", encrypted" if facts["encrypted"] else "") + (", in use" if entry.in_use else "")
    model = Path(facts["model"]).name if facts["model"] else "no model yet"
    disk = f"{format_bytes(entry.disk_bytes)}{shared}"
    return f"{facts['tokens']:>9,} tokens  {disk}  {model}  last used {facts['used']}{busy}"


def _when(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "?"
