"""A source and a sink that talk UCX inside one process, for the contract test."""

from __future__ import annotations

from kernels.cpu import native
from kvpool.transport.ucx import UcxTransport
from tests.kvpool.transport_worlds import RealWorld


class UcxWorld(RealWorld):
    far: UcxTransport
    transport: UcxTransport

    def __init__(self) -> None:
        super().__init__(
            lambda arena, epoch: UcxTransport(arena, epoch, "127.0.0.1", native()), "ucx://127.0.0.1:9/" + "0" * 32
        )
