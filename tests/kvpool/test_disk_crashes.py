"""What crashes and damage do to the DISK tier: a miss at worst, wrong bytes never."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpool.tiers.disk.journal import FILE_NAME, RECORD_BYTES
from kvpool.tiers.disk.requests import Stored
from tandem.errors import ConfigError
from tests.kvpool.child import REPOSITORY
from tests.kvpool.disk_blocks import DiskWorld, key_of

SLAB_BYTES = 5000
"""Not a multiple of the alignment: slots have a tail."""


def kill_while_writing(directories: list[Path], slots: int, first: int, delay_s: float) -> list[int]:
    """A process writes blocks from number `first` on and is killed about `delay_s` after it began; what it acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kvpool.disk_blocks", str(slots), str(SLAB_BYTES), str(first)]
        + [str(directory) for directory in directories],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n", "the writer did not start"
    time.sleep(delay_s)  # the moment of the kill is random on purpose
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    whole_lines = output[: output.rfind("\n") + 1]
    return [int(number) for number in whole_lines.split()]


def run_kills(path: Path, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    directories = [path / "a", path / "b"]
    for directory in directories:
        directory.mkdir()
    slots, first, total = 2048, 0, 0
    for _ in range(num_kills):
        acknowledged = kill_while_writing(directories, slots, first, rng.uniform(0.0, 0.15))
        with DiskWorld(directories, slots=slots, slab_bytes=SLAB_BYTES) as world:
            good = world.check_all()
        recent = acknowledged[-2 * slots + 64 * 4 :]  # what was stored before these may have been evicted
        lost = [number for number in recent if key_of(number) not in good]
        assert not lost, f"{len(lost)} of {len(recent)} acknowledged blocks are lost: {lost[:5]}"
        total += len(acknowledged)
        first = max([first, *acknowledged]) + 1000
    assert total > 0, "the kills came before anything was stored"


def test_what_was_acknowledged_survives_kills_and_no_wrong_bytes_come_up(tmp_path: Path) -> None:
    run_kills(tmp_path, 6, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_acknowledged_survives_200_kills(tmp_path: Path) -> None:
    run_kills(tmp_path, 200, seed=2)


def damage(path: Path, rng: random.Random) -> str:
    """Does one bad thing to a file at a random place; says what."""
    size = path.stat().st_size
    at = rng.randrange(size)
    length = min(rng.choice([1, 8, 96, 500, 5000, 20000]), size - at)
    kind = rng.choice(["truncate", "flip", "overwrite", "zero", "append", "copy"])
    with path.open("r+b") as file:
        if kind == "truncate":
            file.truncate(at)
        elif kind == "append":
            file.seek(size)
            file.write(rng.randbytes(length))
        elif kind == "copy":  # stale but whole pieces, at a place where they don't belong
            file.seek(rng.randrange(size) // RECORD_BYTES * RECORD_BYTES)
            piece = file.read(length)
            file.seek(at // RECORD_BYTES * RECORD_BYTES)
            file.write(piece)
        else:
            file.seek(at)
            old = file.read(length)
            file.seek(at)
            if kind == "flip":
                place = rng.randrange(len(old))
                file.write(old[:place] + bytes([old[place] ^ 1 << rng.randrange(8)]) + old[place + 1 :])
            else:
                file.write(bytes(len(old)) if kind == "zero" else rng.randbytes(len(old)))
    return f"{kind} of {path.name} at {at}, {length} bytes"


def run_damages(path: Path, num_damages: int, seed: int) -> None:
    rng = random.Random(seed)
    whole, broken = path / "whole", path / "broken"
    with DiskWorld([whole], slots=96, slab_bytes=SLAB_BYTES) as world:
        world.store(range(96))
        world.store(range(100, 140))  # over some of them
        world.tier.remove([key_of(131)])
        everything = world.check_all()
    assert len(everything) > 80
    num_refused = num_complete = 0
    for _ in range(num_damages):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        files = [broken / FILE_NAME, broken / "segment-00000"]
        done = [damage(rng.choice(files), rng) for _ in range(rng.choice([1, 1, 3]))]
        try:
            with DiskWorld([broken], slots=96, slab_bytes=SLAB_BYTES) as world:
                good = world.check_all()
                reachable = world.check_all()  # what follows a bad block in its chain went with it
                assert reachable <= good, done
                assert reachable == set(world.held()), f"bad blocks are not forgotten after {done}"
                assert all(isinstance(result, Stored) for result in world.store(range(200, 210)))
                assert {key_of(number) for number in range(200, 210)} <= world.check_all(), done
        except ConfigError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert str(broken / FILE_NAME) in refusal, done
            num_refused += 1
            continue
        num_complete += good == everything
        with DiskWorld([broken], slots=96, slab_bytes=SLAB_BYTES) as world:
            assert {key_of(number) for number in range(200, 210)} <= world.check_all(), done
    assert num_refused < num_damages / 4, "only a damaged header may be refused"
    assert num_complete < num_damages / 2, "the damages did nothing"


def test_damaged_files_give_right_blocks_or_misses(tmp_path: Path) -> None:
    run_damages(tmp_path, 40, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_200_damages_give_right_blocks_or_misses(tmp_path: Path) -> None:
    run_damages(tmp_path, 200, seed=4)
