"""The threads that move one directory's bytes: one that writes (with a `Flusher`), some that read.

Owns the queues between the tier's thread and these, and the order of things: loads go before queued stores, stores and
removals go in the order they were queued, a block's bytes before its record. Verifies what it read. Never touches a pool.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvpool.block_pool import BlockRecord
from kvpool.tiers.disk.directory import Directory
from kvpool.tiers.disk.faults import DiskFull
from kvpool.tiers.disk.flusher import Flusher
from kvpool.tiers.disk.journal import Entry, Removal
from kvpool.tiers.disk.requests import LoadFailed, LoadRequest, NotStored, Stored
from tandem.errors import StorageFault

log = logging.getLogger(__name__)

NUM_READERS = 2
"""While one waits for the disk the other one verifies."""
STEP_ASIDE_S = 0.02
"""A run of stores waits so long for loads, so that it comes to its turn however many there are."""
_CLOSING = "the tier is closing"


@dataclass(frozen=True, slots=True, eq=False)
class WriteBatch:
    """Blocks for one directory, by slot: `entries` for the journal, where they lie in the arena, and their ids in the pool."""

    entries: Sequence[Entry]
    host_ids: Sequence[int]
    disk_ids: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class ReadRun:
    """Consecutive slots of one directory, for whom, and what is known of their blocks."""

    slot: int
    requests: Sequence[LoadRequest]
    records: Sequence[BlockRecord]


@dataclass(frozen=True, slots=True, eq=False)
class WriteEnded:
    """How a batch ended: all of it is stored and recorded, or, with an `error`, nothing of it."""

    directory: int
    batch: WriteBatch
    error: str


@dataclass(frozen=True, slots=True, eq=False)
class ReadEnded:
    """How a run ended: which of its blocks have the right bytes (`[num]` bool); none of them after an `error`."""

    directory: int
    run: ReadRun
    good: NDArray[np.bool_]
    error: str


@dataclass(frozen=True, slots=True)
class DirectoryFailed:
    """The directory does nothing any more."""

    directory: int
    error: str


Outcome = WriteEnded | ReadEnded | DirectoryFailed | Stored | NotStored | LoadFailed


class Outbox:
    """What came out, from any thread to one. `fileno` is readable while there is something to `take`."""

    def __init__(self) -> None:
        self._outcomes: deque[Outcome] = deque()
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def put(self, outcomes: Sequence[Outcome]) -> None:
        with self._lock:
            self._outcomes.extend(outcomes)
            if self._fd >= 0 and outcomes:
                os.eventfd_write(self._fd, 1)

    def take(self) -> list[Outcome]:
        with self._lock:
            if self._outcomes and self._fd >= 0:
                os.eventfd_read(self._fd)
            taken = list(self._outcomes)
            self._outcomes.clear()
            return taken

    def close(self) -> None:
        """`take` still gives what is there and comes. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class IoThreads:
    """The threads of directory `index`. The tier's thread calls the methods; outcomes go to `outbox`.

    A fault other than a full disk ends the directory: one `DirectoryFailed`, and everything queued or queued later ends with
    its error.
    """

    def __init__(self, index: int, directory: Directory, outbox: Outbox) -> None:
        self._index = index
        self._directory = directory
        self._outbox = outbox
        self._changed = threading.Condition()
        self._writes: deque[WriteBatch | Sequence[Removal]] = deque()
        self._reads: deque[ReadRun] = deque()
        self._num_reading = 0
        self._stopping = False
        self._refusing = ""
        name = f"disk-{index}"
        new_buffer = directory.segments.buffer
        buffers = (new_buffer(), new_buffer())
        self._writer = threading.Thread(target=self._write_all, name=f"{name}-write", args=(buffers,), daemon=True)
        self._readers = [
            threading.Thread(target=self._read_all, name=f"{name}-read-{number}", args=(new_buffer(),), daemon=True)
            for number in range(NUM_READERS)
        ]
        for thread in (self._writer, *self._readers):
            thread.start()

    def write(self, batch: WriteBatch | Sequence[Removal]) -> None:
        """Queues blocks to write, or records of removals."""
        with self._changed:
            self._writes.append(batch)
            self._changed.notify_all()

    def read(self, runs: Sequence[ReadRun]) -> None:
        """Queues runs to read, in the order they are needed."""
        with self._changed:
            self._reads.extend(runs)
            self._changed.notify_all()

    def begin_stop(self) -> None:
        """Cancels the loads; the writer goes on to the end of its queue, syncs, and ends."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, deadline_s: float) -> bool:
        """Waits for the threads, until `deadline_s` (time.monotonic) with everything queued, then a last moment for what is on
        its way. False if a thread hangs in its disk even so; then the directory must stay open."""
        self._writer.join(max(0.0, deadline_s - time.monotonic()))
        with self._changed:
            self._refusing = self._refusing or _CLOSING
            self._changed.notify_all()
        last_s = max(deadline_s, time.monotonic() + 0.5)
        for thread in (self._writer, *self._readers):
            thread.join(max(0.0, last_s - time.monotonic()))
        return not any(thread.is_alive() for thread in (self._writer, *self._readers))

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write_all(self, buffers: Sequence[NDArray[np.uint8]]) -> None:
        flusher = Flusher(f"{threading.current_thread().name}-flush")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._writes or self._stopping)
                if not self._writes:
                    break
                batch = self._writes.popleft()
                error = self._refusing
            if not error:
                error = self._guarded(self._write, batch, buffers, flusher)
            if isinstance(batch, WriteBatch):
                self._outbox.put([WriteEnded(self._index, batch, error)])
        flusher.close()
        if not self._refusing:
            self._guarded(self._directory.sync)

    def _write(
        self, batch: WriteBatch | Sequence[Removal], buffers: Sequence[NDArray[np.uint8]], flusher: Flusher
    ) -> None:
        if not isinstance(batch, WriteBatch):
            self._directory.record(batch)
            return
        segments = self._directory.segments
        slots = [entry.slot for entry in batch.entries]
        try:
            for run, buffer in zip(segments.runs(slots), itertools.cycle(buffers)):
                self._step_aside()
                filled = segments.gather(batch.host_ids[run], buffer)
                flusher.begin(partial(segments.flush, slots[run.start], filled))
        finally:
            flusher.wait()
        self._directory.record(batch.entries)

    def _step_aside(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._reads and not self._num_reading, STEP_ASIDE_S)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read_all(self, buffer: NDArray[np.uint8]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reads or self._stopping)
                if not self._reads:
                    return
                run = self._reads.popleft()
                error = self._refusing or (_CLOSING if self._stopping else "")
                self._num_reading += 1
            good = np.zeros(len(run.requests), dtype=np.bool_)
            if not error:
                error = self._guarded(self._read, run, good, buffer)
            with self._changed:
                self._num_reading -= 1
                self._changed.notify_all()
            self._outbox.put([ReadEnded(self._index, run, good, error)])

    def _read(self, run: ReadRun, good: NDArray[np.bool_], buffer: NDArray[np.uint8]) -> None:
        host_ids = [request.block_id for request in run.requests]
        expected = np.frombuffer(b"".join(record.checksum for record in run.records), dtype=">u8")
        good[:] = self._directory.segments.read(run.slot, host_ids, buffer) == expected

    # --- both -------------------------------------------------------------------------------------------------------

    def _guarded(self, call: Callable[..., None], *arguments: object) -> str:
        """Calls it; why it failed, or nothing. Only a full disk leaves the directory in use."""
        try:
            call(*arguments)
        except DiskFull as error:
            return str(error)
        except StorageFault as error:
            return self._fail(str(error))
        except Exception as error:  # a bug here must not leave requests without an end
            log.exception("a thread of %s failed", self._directory.path)
            return self._fail(f"{self._directory.path}: {type(error).__name__}: {error}")
        return ""

    def _fail(self, error: str) -> str:
        with self._changed:
            first = not self._refusing
            self._refusing = self._refusing or error
        if first:
            self._outbox.put([DirectoryFailed(self._index, error)])
        return error
