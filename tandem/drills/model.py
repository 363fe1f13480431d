"""A shallow copy of a model: its first layers alone.

What drills are about doesn't depend on how deep a model is; what they take does. The copy is the GGUF file with another number of
layers in its header: the rest of its tensors is not read.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from tandem.config import cache_dir
from tandem.errors import ModelError
from tandem.model_files import resolve_model

_UINT32 = 4


def shallow(model: str, layers: int) -> Path:
    """The file of `model` with so many layers, made where it is missing. Raises ModelError."""
    source = resolve_model(model)
    if source.suffix != ".gguf":
        raise ModelError(f"{source}: only GGUF files are made shallow")
    target = cache_dir() / "drills" / f"{source.stem}-{layers}-layers.gguf"
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    shutil.copyfile(source, partial)
    try:
        with partial.open("r+b") as file:
            head = file.read(2**20)
            key = b".block_count" + struct.pack("<I", _UINT32)
            at = head.find(key)
            if at < 0:
                raise ModelError(f"{source}: its header begins without a number of layers")
            (there,) = struct.unpack_from("<I", head, at + len(key))
            if not 1 <= layers <= there:
                raise ModelError(f"{source}: has {there} layers, {layers} are asked for")
            file.seek(at + len(key))
            file.write(struct.pack("<I", layers))
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
