"""Lines that can be hurt: TCP proxies on loopback, and a relay of KV events.

Owns the sockets and threads between two parties. A `Line` is what a drill hurts; each `Proxy` of it carries connections to one
address. Bytes pass unchanged or not at all. Closing a line ends everything.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Literal

import zmq

from tandem.clock import now_s

State = Literal["open", "cut", "reset", "blackhole", "slow"]
Direction = Literal["listener", "dialler"]
"""Towards whom bytes go: who listens behind the proxy, or who dialled it."""

_PIECE_BYTES = 65_536
_RST = struct.pack("ii", 1, 0)
_LOOK_MS = 50


class Line:
    """The state of all proxies between two parties, and what has passed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.state: State = "open"
        self.towards: Literal["both", "listener", "dialler"] = "both"
        self.bytes_per_s = 0
        self.num_bytes = 0
        self.num_held = 0
        """Pieces that had to wait."""
        self.num_ended = 0
        """Connections that were ended, or refused, by a change of state."""
        self.proxies: list[Proxy] = []
        self.relays: list[EventRelay] = []

    def set(self, state: State, towards: Literal["both", "listener", "dialler"] = "both", bytes_per_s: int = 0) -> None:
        """From now on. `cut` and `reset` end what is connected."""
        with self.changed:
            self.state, self.towards, self.bytes_per_s = state, towards, bytes_per_s
            self.changed.notify_all()
        if state in ("cut", "reset"):
            for proxy in list(self.proxies):
                self.num_ended += proxy.end_all(by_reset=state == "reset")

    def affects(self, direction: Direction) -> bool:
        return self.state != "open" and self.towards in ("both", direction)

    def close(self) -> None:
        """Ends all its proxies and relays; the line may get new ones."""
        with self.changed:
            self.state = "open"
            self.changed.notify_all()
        for proxy in self.proxies:
            proxy.close()
        for relay in self.relays:
            relay.close()
        self.proxies.clear()
        self.relays.clear()


class Proxy:
    """Listens at `host:port` (0: any) and passes what comes on to `target`."""

    def __init__(self, line: Line, host: str, port: int, target: tuple[str, int]) -> None:
        self._line = line
        self._target = target
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener = socket.create_server((host, port), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        line.proxies.append(self)
        self._closed = False
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def end_all(self, *, by_reset: bool) -> int:
        """Ends every connection; how many there were."""
        with self._lock:
            pairs = list(self._pairs)
            self._pairs.clear()
        for pair in pairs:
            for one in pair:
                _end(one, by_reset=by_reset)
        return len(pairs)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.end_all(by_reset=False)

    def _accept(self) -> None:
        while True:
            try:
                dialler, _ = self._listener.accept()
            except OSError:
                return
            if self._line.state in ("cut", "reset"):
                self._line.num_ended += 1
                _end(dialler, by_reset=True)
                continue
            try:
                listener = socket.create_connection(self._target, timeout=5.0)
            except OSError:
                _end(dialler, by_reset=True)
                continue
            listener.settimeout(None)
            pair = (dialler, listener)
            with self._lock:
                self._pairs.add(pair)
            for source, sink, direction in ((dialler, listener, "listener"), (listener, dialler, "dialler")):
                arguments = (pair, source, sink, direction)
                threading.Thread(target=self._pump, args=arguments, name="proxy", daemon=True).start()

    def _pump(
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        sink: socket.socket,
        direction: Direction,
    ) -> None:
        try:
            while piece := source.recv(_PIECE_BYTES):
                self._wait(direction, len(piece), pair)
                sink.sendall(piece)
                self._line.num_bytes += len(piece)
            self._wait(direction, 0, pair)  # nor does its end pass a blackhole
            if pair in self._pairs:  # else it was us who ended it, and no FIN goes before a reset
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            with self._lock:
                is_ours = pair in self._pairs
                self._pairs.discard(pair)
            if is_ours:
                for one in pair:
                    _end(one, by_reset=False)

    def _wait(self, direction: Direction, num_bytes: int, pair: tuple[socket.socket, socket.socket]) -> None:
        """Until the line lets this many bytes pass."""
        line = self._line
        with line.changed:
            if line.affects(direction):
                line.num_held += 1
            began_s = now_s()
            while not self._closed and line.affects(direction):
                if pair not in self._pairs:
                    raise OSError("the connection was ended")
                if line.state == "slow" and (left_s := began_s + num_bytes / line.bytes_per_s - now_s()) <= 0:
                    return
                line.changed.wait(min(left_s, 0.2) if line.state == "slow" else 0.2)


class EventRelay:
    """Passes KV events from `source` on at `endpoint`, and loses or delays some."""

    def __init__(self, source: str, endpoint: str) -> None:
        self.drop = self.swap = 0
        self.num_passed = self.num_dropped = self.num_swapped = 0
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._in = self._context.socket(zmq.SUB)
        self._in.subscribe(b"")
        self._in.connect(source)
        self._out = self._context.socket(zmq.PUB)
        self._out.bind(endpoint)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        number, late = 0, None
        while not self._stop.is_set():
            if not self._in.poll(_LOOK_MS):
                continue
            frames = self._in.recv_multipart()
            number += 1
            if self.drop and number % self.drop == 0:
                self.num_dropped += 1
                continue
            if late is None and self.swap and number % self.swap == 0:
                late = frames
                continue
            self._out.send_multipart(frames)
            self.num_passed += 1
            if late is not None:
                self._out.send_multipart(late)
                self.num_swapped += 1
                late = None


def _end(one: socket.socket, *, by_reset: bool) -> None:
    with contextlib.suppress(OSError):
        if by_reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
        else:
            one.shutdown(socket.SHUT_RDWR)
    if by_reset:
        with contextlib.suppress(OSError):
            # Wakes a thread that reads, without the FIN that a shutdown of both would send before the reset.
            one.shutdown(socket.SHUT_RD)
    one.close()
