"""The errors Tandem raises, each with the status it becomes at the edge.

Owns the mapping from an error to its gRPC status name and HTTP code; the edge (`router/server.py`) is the only place that
uses it. Running out of room is not here: the block pool answers `None`. `assert` is for our own bugs.
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base of every error that may cross a process. `code` names it on the wire, `grpc_status` and `http_code` at the edge."""

    code: ClassVar[str] = "internal"
    grpc_status: ClassVar[str] = "INTERNAL"
    http_code: ClassVar[int] = 500


class InvalidRequest(TandemError):
    """The client asked for something that can never work; the message names the value and the limit, and `param` the field of
    the request where there is one."""

    code = "invalid_request"
    grpc_status = "INVALID_ARGUMENT"
    http_code = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unauthenticated(TandemError):
    """The client did not say who it is, or nobody here knows the key that it sent."""

    code = "unauthenticated"
    grpc_status = "UNAUTHENTICATED"
    http_code = 401


class PermissionDenied(TandemError):
    """The client is known, and its role doesn't allow what it asked for."""

    code = "permission_denied"
    grpc_status = "PERMISSION_DENIED"
    http_code = 403


class Overloaded(TandemError):
    """There is no room now; `retry_after_s` says when it is worth trying again."""

    code = "overloaded"
    grpc_status = "RESOURCE_EXHAUSTED"
    http_code = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TandemError):
    """The request's deadline passed before its answer was complete."""

    code = "deadline_exceeded"
    grpc_status = "DEADLINE_EXCEEDED"
    http_code = 504


class Cancelled(TandemError):
    """The client went away or asked to stop."""

    code = "cancelled"
    grpc_status = "CANCELLED"
    http_code = 499


class Unavailable(TandemError):
    """No process that could serve this request is alive."""

    code = "unavailable"
    grpc_status = "UNAVAILABLE"
    http_code = 503


class RouterLost(Unavailable):
    """No router answers a client, or the one that did is gone."""

    code = "router_lost"


class WorkerLost(TandemError):
    """A worker died or stopped answering while it owned work."""

    code = "worker_lost"
    grpc_status = "UNAVAILABLE"
    http_code = 503


class Draining(TandemError):
    """A worker is leaving and gives back what it had not finished; others go on with it."""

    code = "draining"
    grpc_status = "UNAVAILABLE"
    http_code = 503


class Quarantined(TandemError):
    """A prompt ended the workers that computed it, one after the other; it is computed no more."""

    code = "quarantined"
    grpc_status = "INTERNAL"
    http_code = 500


class FetchFailed(TandemError):
    """More KV than `recompute_limit_tokens` could not be had from any source; the router plans again."""

    code = "fetch_failed"
    grpc_status = "UNAVAILABLE"
    http_code = 503


class TransportError(TandemError):
    """A transport could not move bytes: the peer is gone, refused, or sent something out of bounds."""

    code = "transport_error"
    grpc_status = "UNAVAILABLE"
    http_code = 503


class ProtocolError(TandemError):
    """A peer sent a message that the protocol does not allow."""

    code = "protocol_error"
    grpc_status = "INTERNAL"
    http_code = 500


class StorageFault(TandemError):
    """A tier could not store or return bytes."""

    code = "storage_fault"
    grpc_status = "INTERNAL"
    http_code = 500


class ModelError(TandemError):
    """A model's files can't be used; the message names the file and the tensor or key."""

    code = "model_error"
    grpc_status = "FAILED_PRECONDITION"
    http_code = 500


class ConfigError(TandemError):
    """The configuration can't be used; the message names the key."""

    code = "config_error"
    grpc_status = "FAILED_PRECONDITION"
    http_code = 500


def _all(base: type[TandemError]) -> list[type[TandemError]]:
    return [base, *(found for sub in base.__subclasses__() for found in _all(sub))]


def error_from_code(code: str, message: str) -> TandemError:
    """The error a peer reported as `(code, message)`; an unknown code is a plain `TandemError`."""
    for kind in _all(TandemError):
        if kind.code == code:
            return kind(message)
    return TandemError(f"{code}: {message}")
