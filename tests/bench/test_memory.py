"""Two workers' memory is read from real processes; weights count as shared only if all of them are, without a private page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tandem.bench import memory
from tandem.bench.memory import Usage, metrics, together, usage
from tandem.bench.report import Metric
from tandem.config import WorkerConfig, packed_dir
from tandem.errors import TandemError
from tests.models import tiny_models

WEIGHTS = Path("/cache/packed/a model-bf16.packed")
SMAPS = """\
55d0-55d8 r--p 00001000 fe:00 17                         /usr/bin/python3.11
Size:                 40 kB
Rss:                  32 kB
Pss:                  16 kB
Shared_Clean:         24 kB
Shared_Dirty:          0 kB
Private_Clean:         8 kB
Private_Dirty:         0 kB
VmFlags: rd mr mw me
7f00-7fff r--s 00000000 fe:00 99                         /cache/packed/a model-bf16.packed
Rss:                 400 kB
Shared_Clean:        400 kB
Shared_Dirty:          0 kB
Private_Clean:         0 kB
Private_Dirty:         0 kB
7fff-8000 r--s 00100000 fe:00 99                         /cache/packed/a model-bf16.packed
Rss:                 112 kB
Shared_Clean:        100 kB
Private_Clean:         4 kB
Private_Dirty:         8 kB
9000-9100 rw-p 00000000 00:00 0
Rss:                  64 kB
Private_Dirty:        64 kB
"""
KIB = 1024


def test_a_processs_pages_are_told_apart() -> None:
    found = usage(SMAPS, WEIGHTS)
    assert (found.rss, found.private) == (608 * KIB, 84 * KIB)
    assert (found.of_file, found.private_of_file) == (500 * KIB, 12 * KIB)
    assert sorted(found.shared.values()) == [24 * KIB, 100 * KIB, 400 * KIB]


def test_pages_of_one_place_in_a_file_are_counted_once() -> None:
    one, two = usage(SMAPS, WEIGHTS), usage(SMAPS.replace("24 kB", "28 kB").replace("fe:00 99", "fe:00 98"), WEIGHTS)
    assert together(one, one) == (2 * 84 + 24 + 400 + 100) * KIB
    assert together(one, two) == (2 * 84 + 28 + 2 * (400 + 100)) * KIB


@pytest.mark.parametrize(
    ("one", "two", "file_bytes", "ok"),
    [
        (Usage(of_file=1000), Usage(of_file=995), 1000, True),
        (Usage(of_file=1000), Usage(of_file=980), 1000, False),
        (Usage(of_file=1000), Usage(of_file=1000, private_of_file=1), 1000, False),
        (Usage(), Usage(), 0, False),
    ],
    ids=["shared", "a part of them", "a private page", "no file"],
)
def test_weights_are_shared_if_both_have_them_whole_and_none_privately(
    one: Usage, two: Usage, file_bytes: int, ok: bool
) -> None:
    assert list(metrics(Usage(rss=1), one, two, file_bytes))[-1].ok == ok


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))


def test_two_real_workers_share_their_weights(tiny_model: Path) -> None:
    said: list[str] = []
    worker = WorkerConfig(arena_bytes=2**20)
    found: dict[str, Metric] = {
        result.metric: result for result in memory.run(tiny_model, "bf16", "int8", worker, said.append)
    }
    assert not psutil.Process().children()
    (file,) = packed_dir().glob("*-int8-*.packed")
    shared = found["weights_shared_by_two_workers"]
    assert shared.ok, shared
    assert shared.reference_value == file.stat().st_size / 2**20
    assert found["rss_of_one_worker"].value > 50
    assert found["rss_of_one_worker"].value < found["memory_of_two_workers"].value
    assert found["memory_of_two_workers"].ratio is not None
    assert found["memory_of_two_workers"].ratio < 1
    assert len(said) == 1


def test_a_worker_that_fails_is_an_error_with_its_words_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "no-model.gguf"
    path.write_bytes(b"no model")
    with pytest.raises(TandemError, match="no-model.gguf") as caught:
        list(memory.run(path, "bf16", "bf16", WorkerConfig(), lambda _: None))
    assert "make peers" not in str(caught.value)
    assert not psutil.Process().children()


def test_a_child_ends_when_its_parent_no_longer_holds_its_stdin(tiny_model: Path) -> None:
    worker = WorkerConfig(arena_bytes=2**20)
    command = [sys.executable, "-m", memory.__name__, str(tiny_model), "bf16", "bf16", worker.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert b"ready" in child.stdout.readline()
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(30) == 0
