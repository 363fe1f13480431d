"""`tandem doctor`: what is wrong with this machine for serving, and how to mend it.

Owns the checks and their limits; changes nothing. Each check runs by itself, so that one failure doesn't hide another.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Callable

import psutil
import typer

from kernels.cpu import SWITCH, native
from tandem.cli.common import ConfigOption, JsonOption, print_json
from tandem.cli.run_file import RunFile
from tandem.clock import now_s
from tandem.config import ROUTER_PORTS, Config, cache_dir, load_config
from tandem.errors import TandemError
from tandem.ports import busy_ports

MiB = 2**20
Finding = tuple[bool, str]
"""Whether all is ok, and the evidence; where it is not ok, the evidence says what to do."""

_PROCESS_BYTES = 700 * MiB
"""What a worker needs beside its arena for a small model: Python, torch, weights."""
_SMALL_PROCESS_BYTES = 250 * MiB
_RAY_BYTES = 700 * MiB
_MIN_FILES = 1024
_MIN_DISK_BYTES = 512 * MiB
_MIN_SHM_BYTES = 128 * MiB


def check_platform(config: Config) -> Finding:
    found = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False, f"{found}; Tandem runs on Linux x86_64"
    return True, found


def check_versions(config: Config) -> Finding:
    names = ("torch", "ray", "grpcio", "pyzmq", "msgspec", "tokenizers")
    return True, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def check_kernels(config: Config) -> Finding:
    found = native()
    if found is not None:
        sources, _, compiler = found.build.partition(" ")
        return True, f"{found.variant}, of sources {sources[:12]}, by compiler {compiler}"
    if os.environ.get(SWITCH):
        return True, f"torch, as {SWITCH} asks: several times slower than the native kernels"
    return (
        False,
        "no native kernels, torch is several times slower: install a C++ compiler (Debian: g++) and Tandem again",
    )


def check_cores(config: Config) -> Finding:
    cores = len(os.sched_getaffinity(0))
    threads = sum(role.threads * role.replicas for role in (config.prefill, config.decode))
    if threads > cores:
        return (
            False,
            f"{threads} engine threads for {cores} cores: lower prefill.threads, decode.threads or the replicas",
        )
    return True, f"{threads} engine threads for {cores} cores"


def check_memory(config: Config) -> Finding:
    workers = [(role.replicas, role.arena_bytes) for role in (config.prefill, config.decode)]
    needed = sum(count * (arena + _PROCESS_BYTES) for count, arena in workers) + _RAY_BYTES + _SMALL_PROCESS_BYTES
    needed += min(1, config.pool.replicas) * (config.pool.host_bytes + _SMALL_PROCESS_BYTES)
    available = psutil.virtual_memory().available
    evidence = f"{available // MiB} MiB available, about {needed // MiB} MiB needed when every arena is full"
    if available < needed:
        return False, f"{evidence}: lower prefill.arena_bytes, decode.arena_bytes or pool.host_bytes"
    return True, evidence


def check_shared_memory(config: Config) -> Finding:
    free = shutil.disk_usage("/dev/shm").free  # nosec B108 # only looked at
    evidence = f"{free // MiB} MiB free in /dev/shm"
    if free < _MIN_SHM_BYTES:
        return False, f"{evidence}, Ray needs {_MIN_SHM_BYTES // MiB}: enlarge it (in a container: --shm-size)"
    return True, evidence


def check_disk(config: Config) -> Finding:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return False, f"{folder} can't be written: set TANDEM_CACHE to a folder that can"
    free = shutil.disk_usage(folder).free
    evidence = f"{free // MiB} MiB free in {folder}"
    if free < _MIN_DISK_BYTES:
        return (
            False,
            f"{evidence}, {_MIN_DISK_BYTES // MiB} are needed for a small model: set TANDEM_CACHE to a larger disk",
        )
    return True, evidence


def check_open_files(config: Config) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_FILES:
        return (
            False,
            f"at most {soft} open files, {_MIN_FILES} are needed: `ulimit -n {_MIN_FILES}` (hard limit {hard})",
        )
    return True, f"at most {soft} open files"


def check_ports(config: Config) -> Finding:
    running = RunFile(config.run_path).read()
    if running is not None:
        return True, f"a cluster of this configuration serves at {running.target} (process {running.pid})"
    router = config.router
    if busy := busy_ports(config):
        return False, f"{'; '.join(busy)}: stop what has it or configure another"
    ports = [str(port) for key in ROUTER_PORTS if (port := getattr(router, key))]
    return True, f"{', '.join(ports)} are free on {router.host}"


def check_model(config: Config) -> Finding:
    from tandem.model_files import resolve_model

    path = resolve_model(config.model.path)
    return True, f"{config.model.path} is {path}"


def check_numerics(config: Config) -> Finding:
    import torch

    from kernels.cpu import native
    from tandem.config import packed_dir
    from tandem.engine.numerics import numerics_class
    from tandem.model_files import resolve_model
    from tandem.models.loader import load_model

    torch.set_num_threads(1)
    kernels = native()
    model = load_model(resolve_model(config.model.path), config.model.dtype, config.model.weights, packed_dir())
    report = numerics_class(model, kernels)
    return report.deterministic, f"{report.evidence}; class {report.digest.hex()[:16]}"


CHECKS: dict[str, Callable[[Config], Finding]] = {
    "platform": check_platform,
    "versions": check_versions,
    "kernels": check_kernels,
    "cores": check_cores,
    "memory": check_memory,
    "shared_memory": check_shared_memory,
    "disk": check_disk,
    "open_files": check_open_files,
    "ports": check_ports,
    "model": check_model,
    "numerics": check_numerics,
}


def doctor(config_path: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Say what is wrong with this machine for the configuration, and how to mend it."""
    config = load_config(config_path)
    healthy = True
    for name, check in CHECKS.items():
        began_s = now_s()
        try:
            ok, evidence = check(config)
        except (TandemError, OSError) as error:
            ok, evidence = False, str(error)
        healthy &= ok
        if as_json:
            print_json({"check": name, "ok": ok, "evidence": evidence, "seconds": round(now_s() - began_s, 3)})
        else:
            print(f"{'ok  ' if ok else 'FAIL'} {name}: {evidence}", flush=True)
    if not healthy:
        raise typer.Exit(1)
