"""Who asks: what a client's credentials make it.

Owns the callers. Every edge (gRPC, HTTP) turns what came with a call into a `Caller` here, and nothing further in reads
credentials. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.metadata import MAX_TENANT_CHARS


@dataclass(frozen=True, slots=True)
class Caller:
    """One who asks. `tenant` shares fairly with others and reads its own answers alone; `is_admin` may change the cluster."""

    tenant: str = ""
    is_admin: bool = True


class Access:
    """Turns credentials into callers. As yet there are none: whoever reaches a port may do everything, as any tenant."""

    def caller(self, authorization: str, tenant: str) -> Caller:
        """The caller with this `Authorization` header (empty: none), which claims to be `tenant` (empty: nobody)."""
        return Caller(tenant[:MAX_TENANT_CHARS])
