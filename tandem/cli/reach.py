"""How a command reaches routers: where they are, and what it shows them.

Owns the credentials that a command was given before its name or by the environment, for as long as it runs.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path

from router.operator import operator_credentials
from tandem.cli.run_file import RunFile
from tandem.client import Client
from tandem.config import Config, load_config
from tandem.credentials import Credentials

_given: ContextVar[Credentials] = ContextVar("given")


def give(credentials: Credentials) -> None:
    """For this command."""
    _given.set(credentials)


def given() -> Credentials:
    """What was given; nothing, where nothing was."""
    return _given.get(Credentials())


def target_of(target: str, config: Config) -> str:
    """Where the router answers: `target` if given, else what the running cluster's run file says, else the configuration."""
    if target:
        return target
    running = RunFile(config.run_path).read()
    return running.target if running else config.router.grpc_target


def connect(target: str, config_path: Path | None) -> Client:
    """A client of `target` if given, else of the cluster of that configuration, as `target_of` finds it."""
    if target:
        return Client(target, credentials=given())
    return connect_own(load_config(config_path))


def connect_own(config: Config, target: str = "") -> Client:
    """A client of the configuration's own cluster, or of that one of its routers which is at `target`."""
    return Client(target or target_of("", config), credentials=operator_credentials(config, given()))
