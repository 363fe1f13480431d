"""How this process reaches each of its sources: by which transport, how fast, and whom it leaves alone for a while.

Owns the measured speeds and the quarantine; opens nothing. Pure: time in, choices out.

Between two processes of one machine whatever needs no network is taken. Otherwise each transport that reaches the peer is
tried with its first `TRIAL_BYTES`; from then on the fastest is taken, by the speed that it shows now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protos.control import Link

DIRECT = frozenset({"shm"})
"""Transports that read the peer's memory itself."""
TRIAL_BYTES = 32 * 1024 * 1024
SMOOTHING_S = 0.25
"""Seconds of moving bytes over which a speed is smoothed."""
FIRST_QUARANTINE_S = 1.0
LONGEST_QUARANTINE_S = 30.0
MAX_REMEMBERED = 4096

Name = tuple[str, bytes]
"""A process and its epoch."""


@dataclass(slots=True)
class _Speed:
    num_bytes: int = 0
    seconds: float = 0.0
    bytes_per_s: float = 0.0


@dataclass(slots=True)
class _Failures:
    count: int = 0
    until_s: float = 0.0


class Links:
    """Speeds and failures by source, bounded: of too many the oldest are forgotten."""

    def __init__(self) -> None:
        self._speeds: dict[tuple[str, str], _Speed] = {}
        self._failures: dict[Name, _Failures] = {}

    def choose(self, process: str, transports: Sequence[str]) -> str | None:
        """The transport to use next, of those that reach the process now (in the order of preference)."""
        direct = [name for name in transports if name in DIRECT]
        if direct or len(transports) < 2:
            return direct[0] if direct else next(iter(transports), None)
        speeds = {name: self._speeds.get((process, name), _Speed()) for name in transports}
        untried = [name for name, speed in speeds.items() if speed.num_bytes < TRIAL_BYTES]
        return untried[0] if untried else max(transports, key=lambda name: speeds[name].bytes_per_s)

    def moved(self, process: str, transport: str, num_bytes: int, seconds: float) -> None:
        """So many bytes took so long, of time in which the transport had something to do."""
        if (process, transport) not in self._speeds and len(self._speeds) >= MAX_REMEMBERED:
            del self._speeds[next(iter(self._speeds))]
        speed = self._speeds.setdefault((process, transport), _Speed())
        speed.num_bytes += num_bytes
        speed.seconds += seconds
        if seconds > 0:
            weight = seconds / min(speed.seconds, SMOOTHING_S + seconds)
            speed.bytes_per_s += weight * (num_bytes / seconds - speed.bytes_per_s)

    def failed(self, name: Name, now_s: float) -> float:
        """That incarnation did not do what it should; until when it is left alone."""
        if name not in self._failures and len(self._failures) >= MAX_REMEMBERED:
            del self._failures[next(iter(self._failures))]
        failures = self._failures.setdefault(name, _Failures())
        pause_s = min(FIRST_QUARANTINE_S * 2**failures.count, LONGEST_QUARANTINE_S)
        failures.count += 1
        failures.until_s = now_s + pause_s
        return failures.until_s

    def worked(self, name: Name) -> None:
        """That incarnation delivered."""
        self._failures.pop(name, None)

    def is_quarantined(self, name: Name, now_s: float) -> bool:
        failures = self._failures.get(name)
        return failures is not None and now_s < failures.until_s

    def report(self) -> list[Link]:
        """What was moved from whom by what, and how fast it goes."""
        return [
            Link(process, transport, speed.num_bytes, speed.bytes_per_s)
            for (process, transport), speed in self._speeds.items()
        ]
