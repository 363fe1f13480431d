"""Packed weights are made once, mapped by all, and made anew whenever the file isn't what it was."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear import ALIGNMENT, WeightFormat
from tandem.engine.runner import Chunk, Runner, layout_for
from tandem.models import loader, packed
from tandem.models.loader import TORCH_DTYPES, LoadedModel, load_model
from tandem.models.packed import PackedWeights, file_name, pack_in_memory, packed_weights
from tests import backends
from tests.models import tiny_models

ROOT = Path(__file__).parents[2]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "panels": torch.randint(0, 256, (3, 65), dtype=torch.uint8, generator=generator),
        "norm": torch.randn(33, generator=generator),
        "panels.bias": torch.randn(64, generator=generator),
        "empty": torch.empty((0, 5)),
        "strided": torch.randn(4, 6, generator=generator).T,
    }


class Source:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Iterable[tuple[str, Tensor]]:
        self.calls += 1
        return tensors().items()


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "some-model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "packed"


def check(found: PackedWeights) -> None:
    expected = tensors()
    assert list(found.tensors) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found.tensors[name], value), name
        assert found.tensors[name].dtype == value.dtype
        assert not found.tensors[name].numel() or found.tensors[name].data_ptr() % ALIGNMENT == 0
    assert found.digest == pack_in_memory(tensors().items).digest


def mapped_files(value: Tensor) -> list[str]:
    """The file behind a tensor's first byte, from /proc/self/maps."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= value.data_ptr() < high:
            found += line.split()[5:]
    return found


def test_weights_in_memory_are_the_sources() -> None:
    check(pack_in_memory(Source()))


def test_the_second_load_maps_the_file_and_asks_the_source_for_nothing(model_path: Path, folder: Path) -> None:
    source = Source()
    check(packed_weights(model_path, "bf16", source, folder))
    found = packed_weights(model_path, "bf16", source, folder)
    check(found)
    assert source.calls == 1
    assert mapped_files(found.tensors["norm"]) == [str(folder / file_name(model_path, "bf16"))]
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".packed"]


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """A model's path, the folder, and the bytes of its packed file."""
    base = tmp_path_factory.mktemp("whole")
    (base / "m.gguf").write_bytes(b"weights")
    packed_weights(base / "m.gguf", "bf16", Source(), base / "packed")
    return base / "m.gguf", base / "packed", (base / "packed" / file_name(base / "m.gguf", "bf16")).read_bytes()


def load_damaged(whole_file: tuple[Path, Path, bytes], content: bytes) -> int:
    """→ how often the source was asked."""
    model_path, folder, _ = whole_file
    (folder / file_name(model_path, "bf16")).write_bytes(content)
    source = Source()
    check(packed_weights(model_path, "bf16", source, folder))
    return source.calls


@given(share=st.floats(0, 0.999999))
def test_a_truncated_file_is_made_anew(whole_file: tuple[Path, Path, bytes], share: float) -> None:
    content = whole_file[2]
    assert load_damaged(whole_file, content[: int(len(content) * share)]) == 1
    assert (whole_file[1] / file_name(whole_file[0], "bf16")).read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"TANDEMW1",
        b"TANDEMW1" + b"\xff" * 8,
        b"TANDEMW1" + (2**40).to_bytes(8, "little") + bytes(8192),
        b"TANDEMW1" + (2).to_bytes(8, "little") + b"{}" + bytes(8192),
        b"TANDEMW0" + bytes(8192),
        bytes(20_000),
        os.urandom(20_000),
    ],
    ids=["empty", "magic", "no-header", "long-header", "empty-header", "other-version", "zeros", "noise"],
)
def test_garbage_is_made_anew_with_a_warning(
    whole_file: tuple[Path, Path, bytes], content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, packed.__name__):
        assert load_damaged(whole_file, content) == 1
    assert "made anew" in caplog.text


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_bit_is_damaged_the_weights_are_right(
    whole_file: tuple[Path, Path, bytes], data: st.DataObject
) -> None:
    content = bytearray(whole_file[2])
    header_end = 16 + int.from_bytes(content[8:16], "little")
    # Half of them in the header, which is small.
    end = header_end if data.draw(st.booleans()) else len(content)
    at = data.draw(st.integers(0, end - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    calls = load_damaged(whole_file, bytes(content))
    if not header_end <= at < 4096:  # where nothing lies
        assert calls == 1, f"byte {at}"


def test_a_file_of_another_model_format_or_state_has_another_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    os.utime(path, ns=(0, 1))
    names = {file_name(path, form) for form in ("bf16", "int8")}
    os.utime(path, ns=(0, 2))
    names.add(file_name(path, "bf16"))
    path.write_bytes(b"longer")
    os.utime(path, ns=(0, 2))
    names.add(file_name(path, "bf16"))
    other = tmp_path / "other" / "m.gguf"
    other.parent.mkdir()
    other.write_bytes(b"longer")
    os.utime(other, ns=(0, 2))
    names.add(file_name(other, "bf16"))
    assert len(names) == 5
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_name(link, "bf16") == file_name(path, "bf16"), "one file by two names"


def test_the_name_of_a_directory_depends_on_each_of_its_files(tmp_path: Path) -> None:
    for name in ("config.json", "a.safetensors"):
        (tmp_path / name).write_text("one")
        os.utime(tmp_path / name, ns=(0, 1))
    names = {file_name(tmp_path, "bf16")}
    for name in ("config.json", "a.safetensors"):
        os.utime(tmp_path / name, ns=(0, 5))
        names.add(file_name(tmp_path, "bf16"))
    (tmp_path / "b.safetensors").write_text("two")
    names.add(file_name(tmp_path, "bf16"))
    assert len(names) == 4


def test_another_packing_has_another_name(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_name(model_path, "bf16")
    monkeypatch.setattr(packed, "PACK_VERSION", packed.PACK_VERSION + 1)
    assert file_name(model_path, "bf16") != before


def test_a_folder_that_cannot_be_made_means_a_private_copy_and_a_warning(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, packed.__name__):
        check(packed_weights(model_path, "bf16", Source(), model_path / "packed"))
    assert "its own copy" in caplog.text


def test_a_full_disk_means_a_private_copy_and_nothing_half_made(
    model_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, packed.__name__):
        patch.setattr(os, "fsync", full)
        check(packed_weights(model_path, "bf16", Source(), folder))
    assert "No space left" in caplog.text
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    source = Source()
    check(packed_weights(model_path, "bf16", source, folder))
    assert source.calls == 1


def test_what_the_source_raises_is_raised_and_nothing_half_made_stays(model_path: Path, folder: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "one", torch.zeros(3)
        raise KeyError("no such tensor")

    with pytest.raises(KeyError):
        packed_weights(model_path, "bf16", broken, folder)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


_CHILD = """
import sys, time
from pathlib import Path
import torch
from tandem.models.packed import packed_weights
here, name, others = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

def source():
    with (here / "made").open("a") as file:
        file.write(name + "\\n")
    # All are on their way before the first file is there.
    end = time.monotonic() + 60
    while not all((here / other).exists() for other in others) and time.monotonic() < end:
        time.sleep(0.01)
    yield "x", torch.arange(100_000, dtype=torch.float32)

(here / name).touch()
print(packed_weights(here / "m.gguf", "bf16", source, here / "packed").digest.hex())
"""


def child(here: Path, name: str, waits_for: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(here), name, *waits_for],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_at_once_make_one_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    names = ["one", "two"]
    children = [child(tmp_path, name, names) for name in names]
    said = [process.communicate(timeout=100)[0] for process in children]
    assert [process.returncode for process in children] == [0, 0]
    assert said[0] == said[1]
    assert len((tmp_path / "made").read_text().split()) == 1
    assert sorted(path.suffix for path in (tmp_path / "packed").iterdir()) == [".lock", ".packed"]


def test_a_process_that_dies_while_it_writes_leaves_the_work_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    process = child(tmp_path, "first", ["never"])
    end = time.monotonic() + 60
    while not (tmp_path / "made").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    folder = tmp_path / "packed"
    assert any(path.name.startswith(".") for path in folder.iterdir())
    check(packed_weights(tmp_path / "m.gguf", "bf16", Source(), folder))
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".packed"]


def names(folder: Path, pattern: str = "*.packed") -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def a_model(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_what_is_made_anew_replaces_what_was_and_those_who_mapped_it_keep_it(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed_weights(model_path, "bf16", Source(), folder)
    packed_weights(model_path, "int8", Source(), folder)
    int8 = file_name(model_path, "int8")
    model_path.write_bytes(b"other weights")
    check(packed_weights(model_path, "bf16", Source(), folder))
    assert names(folder) == {file_name(model_path, "bf16"), int8}
    monkeypatch.setattr(packed, "PACK_VERSION", packed.PACK_VERSION + 1)
    check(packed_weights(model_path, "bf16", Source(), folder))
    assert names(folder) == {file_name(model_path, "bf16"), int8}
    assert mapped_files(first.tensors["norm"])[-1] == "(deleted)"
    check(first)


def test_models_of_one_name_leave_each_other_alone(tmp_path: Path, folder: Path) -> None:
    paths = [a_model(tmp_path / name / "m.gguf", name.encode()) for name in ("a", "b")]
    for path in (*paths, *paths):
        packed_weights(path, "bf16", Source(), folder)
    assert names(folder) == {file_name(path, "bf16") for path in paths}
    assert len(names(folder)) == 2


def test_files_whose_model_is_gone_are_removed_when_another_is_made(tmp_path: Path, folder: Path) -> None:
    gone, kept = a_model(tmp_path / "gone" / "m.gguf", b"1"), a_model(tmp_path / "kept.gguf", b"1")
    packed_weights(gone, "bf16", Source(), folder)
    packed_weights(kept, "bf16", Source(), folder)
    assert len(names(folder)) == 2
    gone.unlink()
    gone.parent.rmdir()
    nobodys = folder / "nobodys.packed"  # not ours: it has no lock
    nobodys.write_bytes(b"x")
    packed_weights(kept, "bf16", Source(), folder)
    assert len(names(folder)) == 3, "a load that makes nothing removes nothing"
    packed_weights(kept, "int8", Source(), folder)
    assert names(folder) == {file_name(kept, "bf16"), file_name(kept, "int8"), "nobodys.packed"}
    assert len(names(folder, "*.lock")) == 2


def test_a_group_that_somebody_has_locked_is_not_removed(tmp_path: Path, folder: Path) -> None:
    gone, kept = a_model(tmp_path / "gone.gguf", b"1"), a_model(tmp_path / "kept.gguf", b"1")
    packed_weights(gone, "bf16", Source(), folder)
    name = file_name(gone, "bf16")
    gone.unlink()
    (lock,) = folder.glob("*.lock")
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        packed_weights(kept, "bf16", Source(), folder)
        assert name in names(folder)
    packed_weights(kept, "int8", Source(), folder)
    assert name not in names(folder)


def test_a_lock_that_was_removed_while_one_waited_for_it_is_taken_anew(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_weights(model_path, "bf16", Source(), folder)
    (lock,) = folder.glob("*.lock")
    flock, asked = fcntl.flock, threading.Semaphore(0)

    def announced(file: IO[bytes], operation: int) -> None:
        asked.release()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", announced)
    source = Source()
    waiter = threading.Thread(target=packed_weights, args=(model_path, "bf16", source, folder))
    with lock.open("a") as removed, (folder / "new").open("a") as new:
        flock(removed, fcntl.LOCK_EX)
        flock(new, fcntl.LOCK_EX)
        for path in folder.glob("*.packed"):
            path.unlink()
        waiter.start()
        assert asked.acquire(timeout=60)
        (folder / "new").rename(lock)
        removed.close()
        assert asked.acquire(timeout=60), "a lock that is no longer there is none"
        assert source.calls == 0
    waiter.join(60)
    assert source.calls == 1
    assert names(folder) == {file_name(model_path, "bf16")}


def test_a_whole_file_is_used_without_its_lock_and_readable_by_others(model_path: Path, folder: Path) -> None:
    packed_weights(model_path, "bf16", Source(), folder)
    (lock,) = folder.glob("*.lock")
    source = Source()
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = packed_weights(model_path, "bf16", source, folder)
    assert source.calls == 0
    assert found.tensors
    assert (folder / file_name(model_path, "bf16")).stat().st_mode & 0o777 == 0o644


def logits(model: LoadedModel) -> Tensor:
    layout = layout_for(model.config, model.dtype, 16)
    arena = torch.zeros((4, *layout.slab_shape), dtype=TORCH_DTYPES[model.dtype])
    return Runner(model, arena, layout, native=backends.best()).run([Chunk(range(1, 40), 0, range(4), True)])


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_a_model_from_a_file_is_the_model_from_memory(
    tiny_checkpoint: Path, folder: Path, form: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = "fp32" if form == "fp32" else "bf16"
    memory, made = load_model(tiny_checkpoint, dtype, form), load_model(tiny_checkpoint, dtype, form, folder)
    monkeypatch.setattr(loader, "packed_tensors", lambda *_: pytest.fail("the weights were read again"))
    mapped = load_model(tiny_checkpoint, dtype, form, folder)
    assert memory.fingerprint == made.fingerprint == mapped.fingerprint
    assert torch.equal(logits(memory), logits(mapped))


def test_a_changed_model_is_packed_anew(tmp_path: Path, folder: Path) -> None:
    path = tiny_models.save(tiny_models.build("llama", {}), tmp_path / "model")
    first = load_model(path, "bf16", None, folder)
    tiny_models.save(tiny_models.build("llama", {}, seed=1), path)
    second = load_model(path, "bf16", None, folder)
    assert first.fingerprint != second.fingerprint == load_model(path, "bf16").fingerprint
    assert names(folder) == {file_name(path, "bf16")}
