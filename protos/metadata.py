"""What calls of `tandem.v1` may carry beside their message, by its name in gRPC's metadata."""

AUTHORIZATION = "authorization"
"""`Bearer` and a key, as in HTTP's header."""

TENANT = "tandem-tenant"
"""By which the line for room is shared fairly where there are no API keys: who calls may claim any. With keys nobody reads it."""
MAX_TENANT_CHARS = 128

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
"""The trace that a call belongs to, as W3C Trace Context has it."""
