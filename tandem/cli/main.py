"""The `tandem` command: its subcommands put together, and how an error ends it.

Owns the command's name and the rule that every expected error is one sentence on stderr and exit code 1. What needs torch or
Ray is imported by the subcommand that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tandem.cli import (
    audit,
    bench,
    capacity,
    curve,
    demo,
    doctor,
    drill,
    explain,
    generate,
    keys,
    models,
    scale,
    serve,
    sim,
    up,
)
from tandem.cli.reach import give
from tandem.credentials import Credentials, Tls
from tandem.errors import TandemError

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Serve a language model on a cluster that runs prefill and decode on different workers.",
    epilog="Exit code 0 means that all is ok, always.",
)


@app.callback()
def _credentials(
    api_key: Annotated[
        str, typer.Option(envvar="TANDEM_API_KEY", help="What goes with each call to a router that wants a key.")
    ] = "",
    tls_ca: Annotated[
        str,
        typer.Option(
            envvar="TANDEM_TLS_CA", help="PEM file: the authority of the routers' certificates; turns TLS on."
        ),
    ] = "",
    tls_cert: Annotated[
        str,
        typer.Option(envvar="TANDEM_TLS_CERT", help="PEM file: this client's certificate, where routers ask for one."),
    ] = "",
    tls_key: Annotated[str, typer.Option(envvar="TANDEM_TLS_KEY", help="PEM file: its key.")] = "",
) -> None:
    tls = Tls(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None
    give(Credentials(api_key, tls))


app.command()(models.pull)
app.command()(serve.serve)
app.command()(up.up)
app.command()(serve.down)
app.command()(serve.status)
app.command()(scale.scale)
app.command()(scale.drain)
app.command()(audit.audit)
app.command()(explain.explain)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(doctor.doctor)
app.command()(drill.drill)
app.command()(demo.demo)
app.command()(capacity.capacity)
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")
app.add_typer(sim.app, name="sim")
app.add_typer(curve.app, name="curve")


def main() -> None:
    """Runs the command and exits with its code."""
    try:
        app()
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output went away
