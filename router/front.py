"""What an edge (HTTP, gRPC) asks of the router it stands before."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from protos import tandem_pb2
from router.access import Access, Caller
from router.live_feed import LiveFeed
from router.metrics import Metrics
from tandem.tokenizer.tokenizer import Tokenizer


class Front(Protocol):
    """A router, as its edges see it. `generate` raises the TandemError with which a request ends, if it does not complete;
    closing the iterator early cancels the request."""

    model: str
    tokenizer: Tokenizer
    access: Access
    metrics: Metrics
    live: LiveFeed

    @property
    def ready(self) -> bool:
        """Whether a request can be served now."""

    @property
    def max_body_bytes(self) -> int:
        """A request's body may be so large."""

    @property
    def client_patience_s(self) -> float:
        """How long a client may leave what it is sent unread."""

    def generate(
        self, request: tandem_pb2.GenerateRequest, budget_s: float | None, caller: Caller
    ) -> AsyncGenerator[tandem_pb2.GenerateResponse, None]: ...

    def cancel(self, request_id: str) -> None:
        """Ends a request, if it is active: whoever reads its answer gets Cancelled."""

    def cluster(self) -> tandem_pb2.GetClusterResponse: ...

    def explain(self, request_id: str, caller: Caller) -> tandem_pb2.ExplainResponse: ...

    async def audit(self) -> tandem_pb2.AuditResponse: ...
