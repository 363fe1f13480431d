"""Packed weights in a file: made once per model, format and machine, mapped read-only by every worker that uses them.

Owns the file's form, its name in the cache folder, the lock of whoever makes it, and the end of files that nobody will ask for
again. The system keeps one copy of a mapped file in memory however many processes read it, and as long as they do: a file that
is removed stays with those that have mapped it.

All files of one model (its path without links) and one format are a group; their names begin with the group's:

    GROUP-STATE.packed    STATE: size and time of change of the model's files, and `PACK_VERSION`
    GROUP.lock            holds the model's path; who has locked it may make and remove files of the group, nobody else
    .GROUP-xxxx           what is being made

Who makes a file removes what the group had before, and groups whose model is gone.

A file is: 8 bytes `TANDEMW1`, u64 LE length of the header, the header (JSON), zeros up to a multiple of 4096, then the
tensors, each at a multiple of 64.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from kernels.linear import ALIGNMENT, PACK_VERSION
from tandem.errors import ModelError

log = logging.getLogger(__name__)

_MAGIC = b"TANDEMW1"
_PAGE = 4096
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_DIMS = 4
_DTYPES = {"u8": torch.uint8, "f32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Source = Callable[[], Iterable[tuple[str, Tensor]]]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: list[int]
    offset: int
    """From the first tensor's begin."""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    digest: str
    checksum: str
    """Of the tensors' bytes and of `_described`."""
    entries: list[_Entry]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A model's packed tensors by name. `digest` (32 bytes): SHA-256 over names, shapes and bytes, in their order."""

    tensors: Mapping[str, Tensor]
    digest: bytes


def _described(digest: str, entries: list[_Entry]) -> bytes:
    """What a header says of its tensors."""
    return msgspec.json.encode((digest, entries))


def _digest_of(name: str, value: Tensor) -> bytes:
    return f"{name}{tuple(value.shape)}{value.dtype}".encode()


def pack_in_memory(source: Source) -> PackedWeights:
    """Without a file: a private copy."""
    digest = hashlib.sha256()
    tensors = {}
    for name, value in source():
        memory = torch.zeros(value.numel() * value.itemsize + ALIGNMENT, dtype=torch.uint8)
        skip = -memory.data_ptr() % ALIGNMENT
        copy = memory[skip : skip + value.numel() * value.itemsize].view(value.dtype).view(value.shape).copy_(value)
        digest.update(_digest_of(name, copy))
        digest.update(copy.view(torch.uint8).numpy())
        tensors[name] = copy
    return PackedWeights(tensors, digest.digest())


def _files_of(model_path: Path) -> list[Path]:
    return sorted(path for path in model_path.iterdir() if path.is_file()) if model_path.is_dir() else [model_path]


def _group(model_path: Path, form: str) -> str:
    source = model_path.resolve()
    return f"{source.stem[:40]}-{form}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}"


def file_name(model_path: Path, form: str) -> str:
    """The name of the packed file of a model as its files are now."""
    digest = hashlib.sha256(f"tandem/packed/{PACK_VERSION}".encode())
    for path in _files_of(model_path):
        found = path.stat()
        digest.update(f"\0{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return f"{_group(model_path, form)}-{digest.hexdigest()[:24]}.packed"


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time has a group. Raises BlockingIOError instead of waiting if told so."""
    while True:
        with path.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, path):  # else the group was removed meanwhile, and this lock locks nothing
                yield
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_group(lock: Path, *, keep_lock: bool) -> None:
    """Removes the files of a locked group, those too that a killed maker left."""
    for path in lock.parent.iterdir():
        if path.name.removeprefix(".").startswith(lock.stem) and not (keep_lock and path == lock):
            path.unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """Removes the groups whose model is gone, but for those that somebody has locked or that we may not remove."""
    for lock in folder.glob("*.lock"):
        with suppress(OSError), _locked(lock, wait=False):
            source = lock.read_bytes()
            try:
                if source:
                    Path(os.fsdecode(source)).stat()
                    continue
            except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: it can't be a path
                pass
            _remove_group(lock, keep_lock=False)


def packed_weights(model_path: Path, form: str, source: Source, folder: Path) -> PackedWeights:
    """The model's packed weights out of the file in `folder`, made first if it isn't there or is damaged.

    Where no file can be written the weights are a private copy, and a warning says so. Raises what `source` raises.
    """
    path = folder / file_name(model_path, form)
    lock = folder / f"{_group(model_path, form)}.lock"
    try:
        found = _open(path)
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(lock):
            found = _open(path)  # somebody else may have made it meanwhile
            if found is None:
                _remove_group(lock, keep_lock=True)
                lock.write_bytes(os.fsencode(model_path.resolve()))
                _write(path, source)
                found = _open(path)
                _remove_orphans(folder)
    except OSError as error:
        log.warning("packed weights can't be kept in %s (%s): this process has its own copy", folder, error)
        return pack_in_memory(source)
    if found is None:
        raise ModelError(f"{path}: was just written and can't be read")
    return found


def _write(path: Path, source: Source) -> None:
    """Writes tensors as they come, then the header, and gives the file its name when it is whole."""
    prefix = f".{path.stem}-"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as body:
        try:
            digest, checksum = hashlib.sha256(), xxhash.xxh3_128()
            entries: list[_Entry] = []
            for name, value in source():
                value = value.contiguous()
                data = value.view(torch.uint8).numpy().reshape(-1)
                entries.append(_Entry(name, _NAMES[value.dtype], list(value.shape), body.tell()))
                digest.update(_digest_of(name, value))
                digest.update(data)
                for part in (data.data, bytes(-len(data) % ALIGNMENT)):
                    checksum.update(part)
                    body.write(part)
            checksum.update(_described(digest.hexdigest(), entries))
            header = msgspec.json.encode(_Header(digest.hexdigest(), checksum.hexdigest(), entries))
            begin = -(-(len(_MAGIC) + 8 + len(header)) // _PAGE) * _PAGE
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as whole:
                try:
                    whole.write(_MAGIC + struct.pack("<Q", len(header)) + header)
                    whole.seek(begin)
                    body.flush()
                    body.seek(0)
                    while part := body.read(2**24):
                        whole.write(part)
                    whole.flush()
                    os.fsync(whole.fileno())
                    os.fchmod(whole.fileno(), 0o644)  # temporary files are for their maker alone
                    Path(whole.name).replace(path)
                except BaseException:
                    Path(whole.name).unlink()
                    raise
        finally:
            Path(body.name).unlink()


class _Damaged(Exception):
    """A file that is not whole, or not one of ours."""


def _open(path: Path) -> PackedWeights | None:
    """Maps a file; None if it isn't there or is damaged."""
    try:
        return _read(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError:
        return None
    except (_Damaged, ValueError) as error:
        log.warning("%s is not a whole file of packed weights (%s): it is made anew", path, error)
        return None


def _read(whole: npt.NDArray[np.uint8]) -> PackedWeights:
    """The tensors of a mapped file. Raises _Damaged."""
    prefix = len(_MAGIC) + 8
    if len(whole) < prefix or bytes(whole[: len(_MAGIC)]) != _MAGIC:
        raise _Damaged("it doesn't begin as one")
    (length,) = struct.unpack("<Q", bytes(whole[len(_MAGIC) : prefix]))
    if length > min(_MAX_HEADER_BYTES, len(whole) - prefix):
        raise _Damaged(f"a header of {length} bytes")
    try:
        header = msgspec.json.decode(bytes(whole[prefix : prefix + length]), type=_Header)
    except msgspec.DecodeError as error:
        raise _Damaged(str(error)) from error
    body = whole[-(-(prefix + length) // _PAGE) * _PAGE :]
    checksum = xxhash.xxh3_128(body.data)
    checksum.update(_described(header.digest, header.entries))
    if checksum.hexdigest() != header.checksum:
        raise _Damaged("its checksum is wrong")
    tensors = {}
    with warnings.catch_warnings():
        # torch has no read-only tensors. Nothing writes to weights, and the mapping would refuse it.
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        bytes_of = torch.frombuffer(body, dtype=torch.uint8) if len(body) else torch.empty(0, dtype=torch.uint8)
    for entry in header.entries:
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None or len(entry.shape) > _MAX_DIMS or any(size < 0 for size in entry.shape):
            raise _Damaged(f"tensor {entry.name!r} is {entry.dtype} {entry.shape}")
        size = int(np.prod(entry.shape, dtype=object)) * dtype.itemsize
        if entry.offset < 0 or entry.offset % ALIGNMENT or entry.offset + size > len(body):
            raise _Damaged(f"tensor {entry.name!r} lies outside")
        tensors[entry.name] = bytes_of[entry.offset : entry.offset + size].view(dtype).view(entry.shape)
    return PackedWeights(tensors, bytes.fromhex(header.digest))
