"""`tandem curve`: the keys by which the cluster's processes know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import JsonOption, print_json
from tandem.curve import ALLOWED, make_keys

app = typer.Typer(no_args_is_help=True, help="The keys by which the cluster's processes know each other.")


@app.callback()
def _group() -> None:
    """Keeps `make` a subcommand while it is the only one."""


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Where the keys go; `control.curve` names it.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Processes that get a key of their own, for example prefill-0; none: one key for each role."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make key pairs: secret keys, a file each, and the list of public keys that are let in."""
    made = make_keys(folder, names or [])
    if as_json:
        print_json({"secret_keys": [str(file) for file in made], "allowed": str(folder / ALLOWED)})
        return
    for file in made:
        print(file)
    print(folder / ALLOWED)
