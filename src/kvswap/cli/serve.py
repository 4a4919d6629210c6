"""``kvswap serve``: an OpenAI-compatible server on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvswap.cli.options import with_weights

NEEDED = ("starlette", "uvicorn", "prometheus_client")


@click.command()
@click.option("--model", required=True, metavar="MODEL", help="Local directory, .gguf file, hub id, or smollm2-135m.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="Its port.")
@click.option("--alias", metavar="NAME", help="What clients call the model.  [default: the name of its folder or file]")
@click.option("--api-key-file", metavar="FILE", help="Keys that clients need one of, one a line.  [default: no key]")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name that the server may be called by, beside localhost and addresses; may be given several times.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    metavar="N",
    help="Requests that may wait for their turn; further ones get status 503.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    metavar="N",
    help="Longest answer, where a request does not say.",
)
@click.option("--kv-memory", metavar="SIZE", help="Memory that the KV cache may hold, such as 24MiB.  [default: auto]")
@click.option("--kv-dir", metavar="DIR", help="Folder on a disk for sessions.  [default: the user's cache folder]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Compute dtype.",
)
@with_weights
@click.option("--config", "config_file", metavar="FILE", help="JSON object of further settings; options override it.")
@click.option(
    "--encrypt", is_flag=True, help="Encrypt new conversations, with the key in KVSWAP_SESSION_KEY or the keyring."
)
@click.option(
    "--disk-quota",
    metavar="SIZE",
    help="Disk for all sessions together; closed ones make room, small ones first, then those used longest ago.  "
    "[default: no limit]",
)
@click.option("--write-limit", metavar="SIZE", help="Most that may be written a day.  [default: no limit]")
@click.option("--no-verify", is_flag=True, help="Do not compare what is read of a session with its checksums.")
def serve(**values: Any) -> None:
    """Serve a model to OpenAI's clients; conversations stay on disk and go on after a restart.

    \b
    Example:
      kvswap serve --model smollm2-135m
    """
    _check_installed()
    from kvswap.cli.configs import read_config
    from kvswap.cli.options import read_limits
    from kvswap.disk.files import prepare_dir
    from kvswap.disk.folders import kv_folder
    from kvswap.serve.server import listen, read_keys

    config, tuned = read_config(values["config_file"], kv_memory=values["kv_memory"], kv_dir=values["kv_dir"])
    limits = read_limits(values["disk_quota"], values["write_limit"])
    keys = read_keys(values["api_key_file"]) if values["api_key_file"] else []
    prepare_dir(kv_folder(config.kv_dir))
    with listen(values["host"], values["port"]) as listening:
        _serve(values, config, tuned, limits, keys, listening)


def _serve(values: dict[str, Any], config: Any, tuned: Any, limits: Any, keys: list[str], listening: Any) -> None:
    from kvswap.cli.display import Display
    from kvswap.cli.loading import load_weights
    from kvswap.serve.answers import Settings
    from kvswap.serve.server import Listening, serve

    display = Display()
    loaded = load_weights(
        values["model"], display, dtype=values["dtype"], weights=values["weights"], no_mmap=values["no_mmap"]
    )
    if tuned is not None:
        config = tuned.choose(loaded, messages=None, new_tokens=values["max_new_tokens"])
    alias = values["alias"] or Path(loaded.name).name
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    click.echo(
        f"{alias} is served at http://{shown}:{port} (OpenAI's API at /v1, a page at /); Ctrl-C ends it", err=True
    )
    serve(
        loaded,
        Settings(config=config, limits=limits, encrypt=values["encrypt"], verify=not values["no_verify"]),
        Listening(
            alias=alias,
            keys=keys,
            hosts=[*values["hosts"], values["host"]],
            max_waiting=values["max_waiting"],
            max_new_tokens=values["max_new_tokens"],
        ),
        [listening],
    )


def _check_installed() -> None:
    from importlib.util import find_spec

    from kvswap.errors import ConfigError

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"kvswap serve needs {', '.join(missing)}", hint="install with: pip install 'kvswap[server]'")
