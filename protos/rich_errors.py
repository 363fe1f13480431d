"""What ends a refused or failed call, beside its status: Google's rich error model, which client libraries of all languages read.

Owns the translation of a TandemError to `google.rpc.Status` and back. The status' details are an `ErrorInfo`, whose reason is the
error's `code`, and a `RetryInfo` where it says when it is worth trying again.
"""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from tandem.errors import Overloaded, TandemError, error_from_code

STATUS_DETAILS = "grpc-status-details-bin"
"""In gRPC's trailing metadata: the serialized `google.rpc.Status`. Without one, or with another domain, no router spoke."""
DOMAIN = "tandem.v1"
MAX_MESSAGE_CHARS = 1000
"""Trailing metadata have little room (8 KiB by default), and a message may quote what a client sent."""


def status_details(error: TandemError) -> bytes:
    """The serialized status of a call that ends with `error`."""
    code: int = grpc.StatusCode[error.grpc_status].value[0]
    status = status_pb2.Status(code=code, message=str(error)[:MAX_MESSAGE_CHARS])
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=DOMAIN))
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    data: bytes = status.SerializeToString()
    return data


def error_of(details: bytes) -> TandemError | None:
    """The error that a router ended a call with; None if these details are not a router's."""
    try:
        status = status_pb2.Status.FromString(details)
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for item in status.details:
            item.Unpack(info) or item.Unpack(retry)
    except DecodeError:
        return None
    if info.domain != DOMAIN:
        return None
    error = error_from_code(info.reason.lower(), status.message)
    if isinstance(error, Overloaded) and retry.HasField("retry_delay"):
        error.retry_after_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    return error
