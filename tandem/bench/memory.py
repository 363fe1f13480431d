"""What workers cost in memory: two real processes that load a model as workers do, run a step, and are looked at while both live.

Owns the children's program (`python -m tandem.bench.memory`) and what is read from `/proc/PID/smaps`. A page that both have
mapped from one file is one page of memory; it is counted once, whoever else may have mapped it.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kernels.linear import WeightFormat
from protos.control import Sampling
from tandem.bench.peers import Peer, Ready, answer
from tandem.bench.report import Metric, Say, metric
from tandem.config import WorkerConfig, packed_dir
from tandem.engine.local import LocalEngine
from tandem.models.loader import Dtype
from tandem.models.packed import file_name

_MIB = 2**20
_START_S = 120.0
_WHOLE = 0.99
"""The share of the weights' file that both must have resident for "whole"."""
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ (?P<offset>[0-9a-f]+) (?P<device>\S+) (?P<inode>\d+) *(?P<path>.*)")
_FIELD = re.compile(r"(?P<name>Rss|Shared_Clean|Shared_Dirty|Private_Clean|Private_Dirty): +(?P<kib>\d+) kB")


@dataclass(slots=True)
class Usage:
    """Bytes that a process has resident: its `rss`, what nobody else has mapped (`private`), and the rest by where it is from
    (file and offset, `shared`). `of_file` and `private_of_file`: those of one file's mappings, shared and clean, and private."""

    rss: int = 0
    private: int = 0
    shared: dict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))
    of_file: int = 0
    private_of_file: int = 0


def usage(smaps: str, file: Path) -> Usage:
    """Reads the text of `/proc/PID/smaps`; `file` is the path that its mappings show, without links."""
    found = Usage()
    place: tuple[str, ...] = ()
    for line in smaps.splitlines():
        if entry := _FIELD.fullmatch(line):
            name, size = entry["name"], int(entry["kib"]) * 1024
            in_file = place[-1] == str(file)
            if name == "Rss":
                found.rss += size
            elif name.startswith("Private"):
                found.private += size
                found.private_of_file += size * in_file
            else:
                found.shared[place] += size
                found.of_file += size * (in_file and name == "Shared_Clean")
        elif mapping := _MAPPING.fullmatch(line):
            place = mapping.groups()
    return found


def together(one: Usage, two: Usage) -> int:
    """Bytes that two processes have resident, those of one place in one file once."""
    places = one.shared.keys() | two.shared.keys()
    return one.private + two.private + sum(max(one.shared[place], two.shared[place]) for place in places)


def run(path: Path, dtype: Dtype, weights: WeightFormat, worker: WorkerConfig, say: Say) -> Iterator[Metric]:
    """The memory of one worker and of two at once. Raises TandemError if one of them fails."""
    say("memory: two workers load the model, one after the other, and run a step")
    file = (packed_dir() / file_name(path, weights)).resolve()
    command = [sys.executable, "-m", __name__, str(path), dtype, weights, worker.model_dump_json()]

    def start() -> Peer:
        return Peer("a worker of `tandem bench engine`", command, start_s=_START_S, advice="")

    def look(child: Peer) -> Usage:
        return usage(Path(f"/proc/{child.pid}/smaps").read_text(encoding="utf-8", errors="surrogateescape"), file)

    with start() as first:
        alone = look(first)
        with start() as second:
            one, two = look(first), look(second)
    yield from metrics(alone, one, two, file.stat().st_size if file.exists() else 0)


def metrics(alone: Usage, one: Usage, two: Usage, file_bytes: int) -> Iterator[Metric]:
    """What a worker `alone` has, and two at once; `file_bytes` is the size of the weights' file, 0 if there is none."""
    shared, private = min(one.of_file, two.of_file), one.private_of_file + two.private_of_file
    yield metric(
        "rss_of_one_worker",
        [alone.rss / _MIB],
        "MiB",
        reference="the file of its weights",
        reference_values=[file_bytes / _MIB],
    )
    yield metric(
        "memory_of_two_workers",
        [together(one, two) / _MIB],
        "MiB",
        reference="twice the RSS of one worker",
        reference_values=[2 * alone.rss / _MIB],
    )
    yield metric(
        "weights_shared_by_two_workers",
        [shared / _MIB],
        "MiB",
        reference=f"the file of the weights; of its pages the workers have {private // 1024} KiB for themselves",
        reference_values=[file_bytes / _MIB],
        goal=f">= {_WHOLE:g} of the file, none of its pages private",
        ok=private == 0 and shared >= _WHOLE * file_bytes > 0,
    )


def _child(path: Path, dtype: Dtype, weights: WeightFormat, worker: WorkerConfig) -> None:
    """A worker's model and engine, one step, and then nothing until the parent closes stdin or ends."""
    engine = LocalEngine(path, dtype=dtype, weights=weights, worker=worker)
    engine.generate([[1, 2, 3]], [Sampling(max_tokens=1)])
    answer(Ready("tandem"))
    sys.stdin.read()


if __name__ == "__main__":
    _path, _dtype, _weights, _worker = sys.argv[1:]
    _form = msgspec.convert(_dtype, Dtype), msgspec.convert(_weights, WeightFormat)
    _child(Path(_path), *_form, WorkerConfig.model_validate_json(_worker))
