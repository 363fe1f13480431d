"""The transports that a configuration names, in the order of preference."""

from __future__ import annotations

from kernels.cpu import Native
from kvpool.arena import Arena
from kvpool.transport.base import Transport
from kvpool.transport.shm import ShmTransport
from kvpool.transport.tcp import TcpTransport
from kvpool.transport.tcp_stream import TlsFiles
from kvpool.transport.ucx import UcxTransport
from tandem.config import TransferConfig


def make_transports(
    transfer: TransferConfig, arena: Arena, epoch: bytes, *, machine_id: str, native: Native | None
) -> list[Transport]:
    """One object for each transport of the configuration, serving `arena`; the caller closes them. Raises TransportError or
    ConfigError for what can't be opened."""
    made: list[Transport] = []
    try:
        for name in dict.fromkeys(transfer.transports):
            match name:
                case "shm":
                    made.append(ShmTransport(arena, epoch, machine_id, native))
                case "ucx":
                    made.append(UcxTransport(arena, epoch, transfer.host, native))
                case "tcp":
                    tls = transfer.tls
                    files = TlsFiles(tls.cert, tls.key, tls.ca) if tls.cert else None
                    made.append(TcpTransport(arena, epoch, transfer.host, native, tls=files))
    except BaseException:
        for transport in made:
            transport.close()
        raise
    return made
