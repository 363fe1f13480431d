"""`tandem keys`: who may ask the routers, as whom, and how much.

Owns the commands; the file is `router/keys_file.py`'s. A key is printed once, when it is made, and is nowhere afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.box import SIMPLE
from rich.table import Table

from router.keyring import Keyring, api_key, new_key
from router.keys_file import KeysFile
from tandem.cli.common import ConfigOption, JsonOption, print_json, stdout
from tandem.config import load_config
from tandem.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="API keys: who may ask, as which tenant, in which role, and how much.")

FileOption = Annotated[Path | None, typer.Option("--file", "-f", help="The keys file. Default: router.keys_file.")]
_LimitOption = Annotated[int | None, typer.Option(min=0, help="0: no limit. Default: as it is.")]


def _file(path: Path | None, config_path: Path | None) -> KeysFile:
    if path is not None:
        return KeysFile(path, "--file")
    configured = load_config(config_path).router.keys_file
    if not configured:
        raise ConfigError("there is no router.keys_file in this configuration: set it, or give --file")
    return KeysFile(Path(configured).expanduser())


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What the key is called, for people.")],
    tenant: Annotated[str, typer.Option(help="Whom it speaks for.")],
    role: Annotated[str, typer.Option(help="client, or admin, who may run the cluster.")] = "client",
    file: FileOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Make a key and print it, once. Routers take it up within about a second."""
    key = new_key()
    entry = api_key(name, tenant, role, key)
    keys_file = _file(file, config_path)
    keys_file.update(lambda keyring: keyring.with_key(entry))
    print(key, flush=True)
    print(f"kept as a digest in {keys_file.path}; the key itself can't be shown again", file=sys.stderr)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Of the key.")],
    file: FileOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Take a key back: no call begins with it any more after about a second. Those that run go on."""
    _file(file, config_path).update(lambda keyring: keyring.without_key(name))


@app.command()
def tenant(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    requests_per_minute: _LimitOption = None,
    tokens_per_minute: _LimitOption = None,
    max_concurrent: _LimitOption = None,
    shared: Annotated[
        bool | None,
        typer.Option("--shared/--not-shared", help="It shares one prefix cache with all others that do."),
    ] = None,
    forget_cache: Annotated[
        bool, typer.Option("--forget-cache", help="Nothing that was cached for it until now is found any more.")
    ] = False,
    file: FileOption = None,
    config_path: ConfigOption = None,
) -> None:
    """Say what a tenant may. Tokens are those of prompts and answers together; each router counts for itself."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "shared": shared,
    }

    def change(keyring: Keyring) -> Keyring:
        rules = keyring.rules(name)
        changed = {key: value for key, value in given.items() if value is not None}
        changed["generation"] = rules.generation + forget_cache
        return keyring.with_rules(name, msgspec.structs.replace(rules, **changed))

    _file(file, config_path).update(change)


@app.command("list")
def list_keys(file: FileOption = None, config_path: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show who has keys. The keys themselves are nowhere."""
    keyring = _file(file, config_path).read()
    rows = [
        {"name": key.name, "tenant": key.tenant, "role": key.role} | msgspec.structs.asdict(keyring.rules(key.tenant))
        for key in keyring.keys
    ]
    if as_json:
        for row in rows:
            print_json(row)
        return
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("name", "tenant", "role", "shared", "requests/min", "tokens/min", "at a time"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        limits = (row[key] or "-" for key in ("requests_per_minute", "tokens_per_minute", "max_concurrent"))
        shared = "yes" if row["shared"] else "no"
        table.add_row(row["name"], row["tenant"], row["role"], shared, *(f"{limit}" for limit in limits))
    stdout.print(table)
