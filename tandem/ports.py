"""The router's ports on this machine: choosing free ones, and saying which are not.

Owns nothing that lasts: every probe is closed before it returns, so an answer is true for that moment only.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from tandem.config import PORT_STEP, ROUTER_PORTS, Config
from tandem.errors import ConfigError

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_FIRST_EPHEMERAL = 32_768
_FIRST_PORT = 10_000
_TRIES = 50


def with_free_ports(config: Config) -> Config:
    """`config` with each of the router's gRPC and control ports that is 0 replaced by one that is free now, for every replica.

    Raises ConfigError if `router.host` is not an address of this machine.
    """
    router = config.router
    with contextlib.ExitStack() as held:
        updates = {}
        for key in ("grpc_port", "control_port"):
            if getattr(router, key) == 0:
                updates[key] = _hold_free(router.host, router.replicas, held)
    return config.model_copy(update={"router": router.model_copy(update=updates)})


def busy_ports(config: Config) -> list[str]:
    """A sentence for each of the routers' ports that can't be listened on now, or that another of their keys has too."""
    found, seen = [], dict[int, str]()
    host = config.router.host
    for number in range(config.router.replicas):
        replica = config.router.replica(number)
        which = f" of router {number}" if number else ""
        for key in ROUTER_PORTS:
            port = getattr(replica, key)
            if not port:
                continue
            if port in seen:
                found.append(f"router.{key}{which} is {port}, and so is {seen[port]}; they must differ")
                continue
            seen[port] = f"router.{key}{which}"
            try:
                _bound(host, port).close()
            except OSError as error:
                found.append(f"router.{key}{which}: can't listen on {host}:{port}: {error.strerror}")
    return found


def free_port(host: str) -> int:
    """One that is free now. Raises ConfigError if `host` is not an address of this machine."""
    with _free(host) as found:
        port: int = found.getsockname()[1]
    return port


def _hold_free(host: str, num_replicas: int, held: contextlib.ExitStack) -> int:
    """A port that is free, like those of the other replicas that follow from it. All stay bound while `held` is open."""
    for _ in range(_TRIES):
        with contextlib.ExitStack() as tried:
            first = tried.enter_context(_free(host))
            port: int = first.getsockname()[1]
            try:
                for number in range(1, num_replicas):
                    tried.enter_context(_bound(host, port + number * PORT_STEP))
            except (OSError, OverflowError):
                continue
            held.push(tried.pop_all())
            return port
    raise ConfigError(f"router.replicas: no {num_replicas} free ports on {host}, each 10 above the last")


def _free(host: str) -> socket.socket:
    """Bound to a free port, if there is one, below those that the system hands to connections: none of those takes it before the
    router does. Raises ConfigError if `host` is not an address of this machine."""
    try:
        for port in random.sample(range(_FIRST_PORT, _first_ephemeral()), _TRIES):
            with contextlib.suppress(OSError):
                return _bound(host, port)
        return _bound(host, 0)
    except OSError as error:
        raise ConfigError(f"router.host: can't listen on {host}: {error.strerror}") from error


def _first_ephemeral() -> int:
    try:
        return max(int(_EPHEMERAL.read_text(encoding="ascii").split()[0]), _FIRST_PORT + _TRIES)
    except (OSError, ValueError, IndexError):
        return _USUAL_FIRST_EPHEMERAL


def _bound(host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # As the servers do: a port that was left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe
