"""The `tandem` command: assembles its subcommands.

Owns the command's name, help and the way errors end it; each subcommand is in a module of its own.
"""

from __future__ import annotations

import typer

app = typer.Typer(name="tandem", no_args_is_help=True, help="Serve a language model on a cluster.")


def main() -> None:
    app()
