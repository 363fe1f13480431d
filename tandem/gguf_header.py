"""The header of a GGUF file: its metadata (key → value), and which tensors lie where.

Owns its decoding, little-endian, versions 2 and 3 (github.com/ggml-org/ggml/blob/master/docs/gguf.md); never reads a tensor.
Every length is checked against the file's size before it is believed, so a corrupted file is a ModelError and never an
endless loop or an absurd allocation. It reads 50,000 tokens in some 50 ms, which `gguf.GGUFReader` takes seconds for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tandem.errors import ModelError

Scalar = int | float | bool | str
Metadata = dict[str, Scalar | list[int] | list[float] | list[str]]

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 65_535
MAX_STRING_BYTES = 16 * 2**20
MAX_ARRAY_ITEMS = 4 * 2**20
MAX_DIMS = 4
MAX_ALIGNMENT = 65_536

_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """What a header says of a tensor, unchecked: `shape` is in row-major order (the file's is reversed), `kind` the number of
    its type, `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class _Reader:
    """What is left of a file. Every error says what was being read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.position = 0

    def take(self, size: int, what: str) -> bytes:
        left = self._size - self.position
        if size > left:
            raise ModelError(f"{what} needs {size} bytes, the file has {left} left: it is truncated, or no GGUF file")
        data = self._file.read(size)
        if len(data) != size:
            raise ModelError(f"{what}: the file ended early")
        self.position += size
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        size = self.u64(what)
        if size > limit:
            raise ModelError(f"{what} is a string of {size} bytes, the limit is {limit}")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{what} is not UTF-8: {error}") from error

    def value(self, what: str) -> Scalar | list[int] | list[float] | list[str]:
        kind = self.u32(what)
        if kind == _ARRAY:
            return self._array(what)
        return self.string(what) if kind == _STRING else self._numbers(kind, 1, what)[0]

    def _array(self, what: str) -> list[int] | list[float] | list[str]:
        kind, count = self.u32(what), self.u64(what)
        if count > MAX_ARRAY_ITEMS:
            raise ModelError(f"{what} is an array of {count} items, the limit is {MAX_ARRAY_ITEMS}")
        if kind == _STRING:
            return [self.string(what) for _ in range(count)]
        if kind == _ARRAY:
            raise ModelError(f"{what} is an array of arrays, which is not supported")
        return list(self._numbers(kind, count, what))

    def _numbers(self, kind: int, count: int, what: str) -> tuple[int, ...] | tuple[float, ...]:
        form = _FORMATS.get(kind)
        if form is None:
            raise ModelError(f"{what}: value type {kind} is unknown")
        layout = struct.Struct(f"<{count}{form}")
        return layout.unpack(self.take(layout.size, what))


def read_metadata(path: Path) -> Metadata:
    """All metadata of the GGUF file at `path`. Raises ModelError naming the file and the key."""
    with _opened(path) as reader:
        return _read_metadata(reader)[0]


def read_header(path: Path) -> tuple[Metadata, dict[str, TensorPlace]]:
    """All metadata of the GGUF file at `path`, and its tensors by their names. Raises ModelError naming the file and the key."""
    with _opened(path) as reader:
        metadata, num_tensors = _read_metadata(reader)
        return metadata, _read_tensors(reader, num_tensors, metadata.get("general.alignment", 32))


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    try:
        with path.open("rb", buffering=2**20) as file:
            yield _Reader(file, path.stat().st_size)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    except ModelError as error:
        raise ModelError(f"{path}: not a usable GGUF file: {error}") from error


def _read_metadata(reader: _Reader) -> tuple[Metadata, int]:
    """And how many tensors there are."""
    if (magic := reader.take(4, "the magic")) != b"GGUF":
        raise ModelError(f"it doesn't begin with 'GGUF', but with {magic!r}")
    if (version := reader.u32("the version")) not in (2, 3):
        raise ModelError(f"version {version} is not supported (2 and 3 are; little-endian only)")
    if (num_tensors := reader.u64("the number of tensors")) > MAX_TENSORS:
        raise ModelError(f"it has {num_tensors} tensors, the limit is {MAX_TENSORS}")
    if (num_keys := reader.u64("the number of keys")) > MAX_KEYS:
        raise ModelError(f"it has {num_keys} keys, the limit is {MAX_KEYS}")
    metadata: Metadata = {}
    for _ in range(num_keys):
        key = reader.string("a key's name", MAX_NAME_BYTES)
        if key in metadata:
            raise ModelError(f"key {key!r} appears twice")
        metadata[key] = reader.value(f"key {key!r}")
    return metadata, num_tensors


def _read_tensors(reader: _Reader, num_tensors: int, alignment: object) -> dict[str, TensorPlace]:
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelError(f"general.alignment is {alignment!r}, must be a power of two up to {MAX_ALIGNMENT}")
    found: dict[str, TensorPlace] = {}
    for _ in range(num_tensors):
        name = reader.string("a tensor's name", MAX_NAME_BYTES)
        if name in found:
            raise ModelError(f"tensor {name!r} appears twice")
        what = f"tensor {name!r}"
        if not 1 <= (dims := reader.u32(what)) <= MAX_DIMS:
            raise ModelError(f"{what} has {dims} dimensions, must be 1 to {MAX_DIMS}")
        shape = tuple(reader.u64(what) for _ in range(dims))[::-1]
        found[name] = TensorPlace(shape, reader.u32(what), reader.u64(what))
    base = -(-reader.position // alignment) * alignment
    return {name: TensorPlace(place.shape, place.kind, base + place.offset) for name, place in found.items()}
