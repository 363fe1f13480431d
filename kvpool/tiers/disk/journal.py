"""The index of one directory of the DISK tier: a log of which block lies in which slot, which survives crashes.

Owns the file `journal`: its header, its records, replaying and compacting them. Never touches the blocks' bytes.

    header   magic 8s | version u32 | 0 u32 | slab_bytes u64 | slots u64 | group 32s | 0 24s | seal u64
    record   seal u64 | kind u16 | num_tokens u16 | 0 u32 | slot u64 | sequence u64 | stored_at_s u64 | key 16s | parent 16s |
             checksum 8s | writer 8s | owner 8s                                            little-endian, 96 bytes each

A seal is xxh3-64 of the other 88 bytes. The last `STORED` record of a slot says what lies in it; `REMOVED` ends every
earlier record of its key.

What crashes do. A block's bytes are written before its record, so a record never promises what was not written. Records are
appended by one write() a batch and not synced: a killed process loses nothing that was acknowledged, a power cut may lose
the last records, which is a miss. A slot may be written anew while an older record still names it, and a record that was
lost may bring back one that it superseded; both are harmless, because a block is only ever given out after its bytes were
compared with the record's checksum.

A torn tail is cut off. A damaged record in the middle is skipped and those after it hold: records have a fixed size, each
stands for itself, and what losing one can do is said above.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.keys import Key
from kvpool.tiers.disk.faults import fault
from tandem.errors import ConfigError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FILE_NAME = "journal"
GROUP_BYTES = 32
RECORD_BYTES = 96
STORED = 1
REMOVED = 2

SPARE_RECORDS = 4096
"""The log is compacted when it has this many records more than twice what lives."""

RECORD = np.dtype(
    [
        ("seal", "<u8"),
        ("kind", "<u2"),
        ("num_tokens", "<u2"),
        ("zero", "<u4"),
        ("slot", "<u8"),
        ("sequence", "<u8"),
        ("stored_at_s", "<u8"),
        ("key", "V16"),
        ("parent", "V16"),
        ("checksum", "V8"),
        ("writer", "V8"),
        ("owner", "V8"),
    ]
)
Records = NDArray[np.void]
"""`[n]` of dtype `RECORD`."""

_NEW = ".new"
_MAGIC = b"TNDM-KVJ"
_HEADER = struct.Struct("<8sI4xQQ32s24x")
_RECORD_BODY = struct.Struct("<HH4xQQQ16s16s8s8s8s")
_SEAL = struct.Struct("<Q")


class Entry(NamedTuple):
    """One block on disk; a tuple, because one is made for every block that is stored. `slot` is the directory's; `sequence`
    orders the records of all directories of a tier; `writer` is the epoch of the process that made the block, `owner` whoever it
    counts against; `stored_at_s` is Unix time."""

    slot: int
    sequence: int
    stored_at_s: int
    key: Key
    parent: Key
    num_tokens: int
    checksum: bytes
    writer: bytes
    owner: bytes


@dataclass(frozen=True, slots=True)
class Removal:
    """The block `key` is not to be found any more."""

    sequence: int
    key: Key


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a log says. `live` are the records of what lies in the slots, in the log's order; `num_records` counts records up to
    the last good one, `num_damaged` those of them, and of the tail after it, that are not good."""

    live: Records
    num_records: int
    num_damaged: int


def encode_stored(entry: Entry) -> bytes:
    """The `STORED` record of one block, `RECORD_BYTES` long."""
    return _sealed(
        _RECORD_BODY.pack(
            STORED,
            entry.num_tokens,
            entry.slot,
            entry.sequence,
            entry.stored_at_s,
            entry.key,
            entry.parent,
            entry.checksum,
            entry.writer,
            entry.owner,
        )
    )


def encode_removed(removal: Removal) -> bytes:
    """The `REMOVED` record of one block, `RECORD_BYTES` long."""
    return _sealed(_RECORD_BODY.pack(REMOVED, 0, 0, removal.sequence, 0, removal.key, b"", b"", b"", b""))


def _sealed(body: bytes) -> bytes:
    return _SEAL.pack(xxhash.xxh3_64_intdigest(body)) + body


def replay(data: bytes, slots: int) -> Replayed:
    """What the records in `data` (whatever follows a header, of any length) say of a directory of `slots` slots."""
    records = np.frombuffer(data, dtype=RECORD, count=len(data) // RECORD_BYTES)
    good = _good(data, records)
    found = np.flatnonzero(good)
    num_records = int(found[-1]) + 1 if len(found) else 0
    num_damaged = int(len(good) - len(found)) + (len(data) % RECORD_BYTES > 0)

    stored = found[(records["kind"][found] == STORED) & (records["slot"][found] < slots)]
    last = np.full(slots, -1, dtype=np.int64)
    np.maximum.at(last, records["slot"][stored].astype(np.int64), stored)
    live = np.sort(last[last >= 0])

    removed = found[records["kind"][found] == REMOVED]
    if len(removed):
        removed_at = dict(zip(_keys(records[removed]), removed.tolist(), strict=True))
        at = zip(_keys(records[live]), live.tolist(), strict=True)
        live = live[np.fromiter((index > removed_at.get(key, -1) for key, index in at), np.bool_, len(live))]
    return Replayed(records[live], num_records, num_damaged)


def _good(data: bytes, records: Records) -> NDArray[np.bool_]:
    """Which records bear their own seal."""
    good: NDArray[np.bool_] = (records["kind"] == STORED) | (records["kind"] == REMOVED)
    candidates = np.flatnonzero(good)
    view = memoryview(data)
    digest = xxhash.xxh3_64_intdigest
    begins = (candidates * RECORD_BYTES).tolist()
    seals = np.fromiter((digest(view[at + 8 : at + RECORD_BYTES]) for at in begins), np.uint64, len(begins))
    good[candidates] = seals == records["seal"][candidates]
    return good


def _keys(records: Records) -> list[Key]:
    return split(records["key"])


def split(column: Records) -> list[bytes]:
    """The bytes of each element of one column of records."""
    width = column.dtype.itemsize
    data = column.tobytes()
    return [data[at : at + width] for at in range(0, len(data), width)]


class Journal:
    """The open log of one directory. One thread at a time calls it.

    Opening replays it: `live` are its blocks. Raises ConfigError if the file is damaged at its head, or of another format
    version, slab size or group, StorageFault if it can't be read or written. A file made for another number of slots is taken
    over: blocks in slots that there are no longer are forgotten.
    """

    def __init__(self, directory: Path, *, slab_bytes: int, slots: int, group: bytes) -> None:
        assert len(group) == GROUP_BYTES, f"a group digest of {len(group)} bytes"
        self._directory = directory
        self._path = directory / FILE_NAME
        self._slab_bytes = slab_bytes
        self._slots = slots
        self._group = group
        self._fd = -1
        self.num_records = 0
        """Records in the file, live or not: what the next recovery has to read."""
        self._used = np.zeros(slots, dtype=np.bool_)
        self._num_used = 0
        self._not_before = 0
        try:
            self.live = self._open()
        except OSError as error:
            self._close_fd()
            raise fault(self._path, "opening the journal", error) from error
        except BaseException:
            self._close_fd()
            raise

    def append(self, records: Sequence[Entry | Removal]) -> None:
        """Adds records, in order, with one write; compacts the log when that is due. Raises StorageFault, and then none of them
        is in the log."""
        data = b"".join(
            encode_stored(record) if isinstance(record, Entry) else encode_removed(record) for record in records
        )
        offset = (1 + self.num_records) * RECORD_BYTES
        try:
            _write_all(self._fd, data, offset)
        except OSError as error:
            self._cut_off(offset)
            raise fault(self._path, f"appending {len(records)} records", error) from error
        self.num_records += len(records)
        slots = np.array(sorted({record.slot for record in records if isinstance(record, Entry)}), dtype=np.int64)
        self._num_used += int(np.count_nonzero(~self._used[slots]))
        self._used[slots] = True
        if self._is_long():
            self._compact()

    def sync(self) -> None:
        """Returns when what was appended survives a power cut. Raises StorageFault."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise fault(self._path, "syncing the journal", error) from error

    def close(self) -> None:
        """Gives the file up, without syncing it. Idempotent."""
        self._close_fd()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self) -> Records:
        self._path.with_suffix(_NEW).unlink(missing_ok=True)
        if not self._path.exists():
            self._rewrite(np.empty(0, dtype=RECORD))
            return np.empty(0, dtype=RECORD)
        data = self._path.read_bytes()
        slots = self._check_header(data[:RECORD_BYTES])
        replayed = replay(data[RECORD_BYTES:], self._slots)
        if replayed.num_damaged:
            log.warning("%s: %d damaged or torn records discarded", self._path, replayed.num_damaged)
        if slots != self._slots:
            self._rewrite(replayed.live)
            return replayed.live
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self._fd, (1 + replayed.num_records) * RECORD_BYTES)
        self._count(replayed.live, replayed.num_records)
        if self._is_long():
            self._rewrite(replayed.live)
        return replayed.live

    def _check_header(self, header: bytes) -> int:
        """The number of slots that the file was made for."""
        remedy = "empty the directory or name another one"
        if len(header) < RECORD_BYTES or header[:8] != _MAGIC:
            raise ConfigError(f"{self._path}: no journal of a DISK tier, or its header is damaged: {remedy}")
        _, version, slab_bytes, slots, group = _HEADER.unpack_from(header)
        if version != FORMAT_VERSION:
            raise ConfigError(f"{self._path}: has format version {version}, this is version {FORMAT_VERSION}: {remedy}")
        if _SEAL.unpack_from(header, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(header[: _HEADER.size]):
            raise ConfigError(f"{self._path}: its header is damaged: {remedy}")
        if slab_bytes != self._slab_bytes:
            raise ConfigError(
                f"{self._path}: holds slabs of {slab_bytes} bytes, ours have {self._slab_bytes}: {remedy}"
            )
        if group != self._group:
            raise ConfigError(
                f"{self._path}: holds blocks of the group {group.hex()[:16]}…, ours is {self._group.hex()[:16]}… "
                f"(another model, KV format or numerics class): {remedy}"
            )
        return int(slots)

    def _compact(self) -> None:
        try:
            data = self._path.read_bytes()[: (1 + self.num_records) * RECORD_BYTES]
            self._rewrite(replay(data[RECORD_BYTES:], self._slots).live)
        except OSError as error:
            # The long log is as good; it is tried again when it has grown once more.
            log.warning("%s: can't compact the journal: %s", self._path, error)
            self._not_before = self.num_records + SPARE_RECORDS

    def _rewrite(self, live: Records) -> None:
        """Replaces the file by one of `live` alone: whoever crashes here finds either the one or the other."""
        header = _HEADER.pack(_MAGIC, FORMAT_VERSION, self._slab_bytes, self._slots, self._group)
        header += _SEAL.pack(xxhash.xxh3_64_intdigest(header))
        new_path = self._path.with_suffix(_NEW)
        fd = os.open(new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, header + live.tobytes(), 0)
            os.fsync(fd)
            new_path.rename(self._path)
        except BaseException:
            os.close(fd)
            raise
        self._close_fd()
        self._fd = fd
        self._count(live, len(live))
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _count(self, live: Records, num_records: int) -> None:
        self.num_records = num_records
        self._used[:] = False
        self._used[live["slot"].astype(np.int64)] = True
        self._num_used = len(live)

    def _is_long(self) -> bool:
        return self.num_records > max(2 * self._num_used + SPARE_RECORDS, self._not_before)

    def _cut_off(self, offset: int) -> None:
        """What an append left behind must not be found after records that are appended later and are shorter."""
        try:
            os.ftruncate(self._fd, offset)
        except OSError as error:
            log.warning("%s: can't cut off half an append: %s", self._path, error)

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def max_bytes(slots: int) -> int:
    """What the journal of a directory of `slots` slots may take, while it is being compacted."""
    return (2 + 3 * slots + SPARE_RECORDS) * RECORD_BYTES


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        view = view[written:]
        offset += written
