"""How much each tenant may ask: requests and tokens a minute, requests at a time.

Owns the buckets. Pure: time is an argument. Each router counts for itself.

A bucket holds one minute's worth and refills evenly. A request is let in while its tenant's buckets are not empty, and takes
what it costs when that is known, tokens as they come: the bucket may go below zero, and whoever comes next waits until it is
filled again. So a tenant gets its rate over time and can be ahead of it by what it had running. What goes on with an answer that
broke off may overdraw by a minute more, and by as many requests: the loss of a router must not end it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from router.keyring import TenantRules
from tandem.errors import Overloaded

_BUSY_RETRY_S = 1.0


class TokenBucket:
    """`per_minute` a minute, and as much at most at once. 0: no limit."""

    __slots__ = ("_filled_at_s", "_level", "per_minute")

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._filled_at_s = now_s

    def wait_s(self, amount: float, now_s: float, overdraft: float = 0.0) -> float:
        """Until it holds `amount`, when it may be overdrawn by so much; 0: it does."""
        if not self.per_minute:
            return 0.0
        self._fill(now_s)
        return max(0.0, (amount - overdraft - self._level) * 60.0 / self.per_minute)

    def take(self, amount: float, now_s: float) -> None:
        """Below zero if need be."""
        if self.per_minute:
            self._fill(now_s)
            self._level -= amount

    def resize(self, per_minute: float, now_s: float) -> None:
        """What was used stays used."""
        if per_minute != self.per_minute:
            self._fill(now_s)
            self._level += per_minute - self.per_minute
            self.per_minute = per_minute

    def _fill(self, now_s: float) -> None:
        passed_s, self._filled_at_s = now_s - self._filled_at_s, now_s
        self._level = min(self.per_minute, self._level + passed_s * self.per_minute / 60.0)


@dataclass(slots=True)
class _Tenant:
    requests: TokenBucket
    tokens: TokenBucket
    num_running: int = 0


class Quotas:
    """What every tenant with limits has used. Bounded by the tenants of the keyring: nobody else has any."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}

    def begin(self, tenant: str, rules: TenantRules, now_s: float, *, resumed: bool = False) -> Use:
        """A request comes. Raises Overloaded, with the seconds to wait, if the tenant may not have it now."""
        if not (rules.requests_per_minute or rules.tokens_per_minute or rules.max_concurrent):
            self._tenants.pop(tenant, None)
            return Use(None)
        used = self._tenants.get(tenant)
        if used is None:
            used = self._tenants[tenant] = _Tenant(
                TokenBucket(rules.requests_per_minute, now_s), TokenBucket(rules.tokens_per_minute, now_s)
            )
        used.requests.resize(rules.requests_per_minute, now_s)
        used.tokens.resize(rules.tokens_per_minute, now_s)
        most = rules.max_concurrent * (2 if resumed else 1)
        if most and used.num_running >= most:
            raise _refusal(tenant, f"has {used.num_running} requests at a time, the limit is {most}", _BUSY_RETRY_S)
        for bucket, what in ((used.requests, "requests"), (used.tokens, "tokens")):
            wait_s = bucket.wait_s(1.0, now_s, overdraft=bucket.per_minute if resumed else 0.0)
            if wait_s > 0.0:
                raise _refusal(tenant, f"has used its {bucket.per_minute:g} {what} a minute", wait_s)
        used.requests.take(1.0, now_s)
        used.num_running += 1
        return Use(used)


class Use:
    """One request that was let in, as a context: it is over when that is left."""

    __slots__ = ("_tenant",)

    def __init__(self, tenant: _Tenant | None) -> None:
        self._tenant = tenant

    def tokens(self, count: int, now_s: float) -> None:
        """So many more, of its prompt or its answers."""
        if self._tenant is not None:
            self._tenant.tokens.take(count, now_s)

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tenant is not None:
            self._tenant.num_running -= 1


def _refusal(tenant: str, why: str, retry_s: float) -> Overloaded:
    retry_s = max(0.1, retry_s)
    return Overloaded(f"tenant {tenant!r} {why}; retry in {retry_s:.1f} s", retry_s)
