"""The journal of a directory: what it says after any end, how long it gets, what it refuses."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.tiers.disk.faults import DiskFull
from kvpool.tiers.disk.journal import (
    FILE_NAME,
    RECORD_BYTES,
    SPARE_RECORDS,
    Entry,
    Journal,
    Records,
    Removal,
    encode_removed,
    encode_stored,
    replay,
    split,
)
from tandem.errors import ConfigError, StorageFault

SLOTS = 6
GROUP = b"g" * 32


def entry(slot: int, name: int, sequence: int = 0) -> Entry:
    return Entry(slot, sequence, 1_700_000_000, b"%016d" % name, b"p" * 16, 16, b"checksum", b"writer..", b"owner...")


def encoded(record: Entry | Removal) -> bytes:
    return encode_stored(record) if isinstance(record, Entry) else encode_removed(record)


def open_journal(path: Path, *, slab_bytes: int = 4096, slots: int = SLOTS, group: bytes = GROUP) -> Journal:
    return Journal(path, slab_bytes=slab_bytes, slots=slots, group=group)


def said(records: Records) -> dict[int, bytes]:
    return dict(zip(records["slot"].tolist(), split(records["key"]), strict=True))


operations = st.lists(
    st.one_of(
        st.builds(entry, st.integers(0, SLOTS - 1), st.integers(0, 8)),
        st.builds(lambda name: Removal(0, b"%016d" % name), st.integers(0, 8)),
    ),
    max_size=40,
)


def model(records: list[Entry | Removal]) -> dict[int, bytes]:
    held: dict[int, bytes] = {}
    for record in records:
        if isinstance(record, Entry):
            held[record.slot] = record.key
        else:
            held = {slot: key for slot, key in held.items() if key != record.key}
    return held


@given(operations, st.binary(max_size=2 * RECORD_BYTES))
def test_replay_says_what_was_written_whatever_follows_it(records: list[Entry | Removal], tail: bytes) -> None:
    replayed = replay(b"".join(map(encoded, records)) + tail, SLOTS)
    assert said(replayed.live) == model(records)
    assert replayed.num_records == len(records)
    assert (replayed.num_damaged > 0) == (len(tail) > 0)


@given(operations.filter(len), st.data())
def test_a_damaged_record_is_skipped_and_the_others_hold(records: list[Entry | Removal], data: st.DataObject) -> None:
    log = bytearray(b"".join(map(encoded, records)))
    at = data.draw(st.integers(0, len(log) - 1))
    log[at] ^= data.draw(st.integers(1, 255))
    damaged = at // RECORD_BYTES
    replayed = replay(bytes(log), SLOTS)
    assert said(replayed.live) == model(records[:damaged] + records[damaged + 1 :])
    assert replayed.num_damaged == 1


@given(operations, st.integers(0, 40 * RECORD_BYTES))
def test_a_log_cut_anywhere_says_what_its_whole_records_say(records: list[Entry | Removal], cut: int) -> None:
    log = b"".join(map(encoded, records))[:cut]
    assert said(replay(log, SLOTS).live) == model(records[: len(log) // RECORD_BYTES])


def test_every_field_comes_back(tmp_path: Path) -> None:
    written = Entry(3, 77, 1_800_000_000, bytes(range(16)), b"\0" * 15 + b"p", 9, b"\0" * 8, b"12345678", b"abcdefg\0")
    journal = open_journal(tmp_path)
    journal.append([written])
    journal.close()
    live = open_journal(tmp_path).live
    columns = [live[name] for name in ("slot", "sequence", "stored_at_s")]
    names = ("key", "parent", "num_tokens", "checksum", "writer", "owner")
    values = [int(column[0]) for column in columns]
    values += [int(live[name][0]) if name == "num_tokens" else split(live[name])[0] for name in names]
    assert tuple(values) == tuple(written)


@settings(max_examples=30)
@given(st.lists(operations, min_size=1, max_size=5))
def test_reopening_goes_on_where_the_last_process_ended(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[Entry | Removal]]
) -> None:
    path = tmp_path_factory.mktemp("journal")
    everything: list[Entry | Removal] = []
    for run in runs:
        journal = open_journal(path)
        assert said(journal.live) == model(everything)
        journal.append(run)
        everything += run
        journal.close()
        with (path / FILE_NAME).open("ab") as file:
            file.write(b"a torn tail")
    assert said(open_journal(path).live) == model(everything)


def test_a_log_much_longer_than_what_lives_is_compacted(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    longest = 0
    for number in range(4 * SPARE_RECORDS // 64):
        journal.append([entry(slot % SLOTS, 64 * number + slot) for slot in range(64)])
        longest = max(longest, journal.num_records)
    journal.close()
    assert longest <= 2 * SLOTS + SPARE_RECORDS + 64
    last = 64 * number
    expected = {slot % SLOTS: b"%016d" % (last + slot) for slot in range(64)}
    reopened = open_journal(tmp_path)
    assert said(reopened.live) == expected
    assert (tmp_path / FILE_NAME).stat().st_size == (1 + reopened.num_records) * RECORD_BYTES
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_what_a_crash_in_a_compaction_left_is_removed(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.append([entry(1, 1)])
    journal.close()
    (tmp_path / f"{FILE_NAME}.new").write_bytes(b"half a journal")
    assert said(open_journal(tmp_path).live) == {1: b"%016d" % 1}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_compaction_that_fails_keeps_the_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for number in range(2 * SPARE_RECORDS // 64):
        journal.append([entry(slot % SLOTS, 64 * number + slot) for slot in range(64)])
    assert journal.num_records == 2 * SPARE_RECORDS
    journal.close()
    monkeypatch.undo()
    assert said(open_journal(tmp_path).live) == {slot % SLOTS: b"%016d" % (64 * number + slot) for slot in range(64)}


def test_an_append_that_failed_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a long append must not come up again behind a shorter one that follows it."""
    journal = open_journal(tmp_path)
    journal.append([entry(0, 0)])
    real = os.pwrite

    def half(fd: int, data: memoryview, offset: int) -> int:
        if len(data) <= 2 * RECORD_BYTES:
            raise OSError(28, "No space left on device")
        return real(fd, data[: 3 * RECORD_BYTES], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(DiskFull, match="appending 5 records.*No space left"):
        journal.append([entry(slot, 10 + slot) for slot in range(5)])
    monkeypatch.undo()
    journal.append([entry(5, 5)])
    journal.close()
    assert said(open_journal(tmp_path).live) == {0: b"%016d" % 0, 5: b"%016d" % 5}


def test_another_number_of_slots_is_taken_over(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.append([entry(slot, slot) for slot in range(SLOTS)])
    journal.close()
    smaller = open_journal(tmp_path, slots=3)
    assert sorted(said(smaller.live)) == [0, 1, 2]
    smaller.append([entry(2, 99)])
    smaller.close()
    assert said(open_journal(tmp_path, slots=8).live) == {0: b"%016d" % 0, 1: b"%016d" % 1, 2: b"%016d" % 99}


def test_a_journal_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    path = tmp_path / FILE_NAME
    with pytest.raises(ConfigError, match=f"{path}: holds slabs of 4096 bytes, ours have 8192: empty the directory"):
        open_journal(tmp_path, slab_bytes=8192)
    with pytest.raises(ConfigError, match=f"{path}: holds blocks of the group 6767676767676767….*ours is 68686868"):
        open_journal(tmp_path, group=b"h" * 32)
    header = path.read_bytes()
    path.write_bytes(header[:8] + struct.pack("<I", 7) + header[12:])
    with pytest.raises(ConfigError, match=f"{path}: has format version 7, this is version 1: empty the directory"):
        open_journal(tmp_path)
    for damaged in (b"", header[:50], b"something else entirely" * 10, header[:20] + b"\xff" + header[21:]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"{path}: .*header is damaged"):
            open_journal(tmp_path)
        assert path.read_bytes() == damaged, "what is refused is left as it is"


def test_a_journal_that_can_not_be_read_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StorageFault, match="opening the journal: Is a directory"):
        open_journal(tmp_path)


def test_a_long_log_is_replayed_in_a_fraction_of_a_second() -> None:
    num_records = 100_000
    log = b"".join(encode_stored(entry(number, number)) for number in range(num_records))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        replayed = replay(log, num_records)
        seconds.append(time.perf_counter() - begin)
    assert len(replayed.live) == num_records
    assert np.array_equal(replayed.live["slot"], np.arange(num_records))
    assert min(seconds) < 0.5
