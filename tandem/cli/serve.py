"""`tandem serve`, `down` and `status`: the life of a cluster on this machine.

Owns the run file's use and the signals of the serving process; what runs is `tandem.cluster`'s.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from tandem.cli.common import (
    ConfigOption,
    JsonOption,
    TargetOption,
    as_dict,
    cluster_table,
    link_lines,
    print_json,
    stdout,
)
from tandem.cli.reach import connect, connect_own, given
from tandem.cli.run_file import RunFile
from tandem.clock import now_s
from tandem.config import Config, load_config
from tandem.errors import DeadlineExceeded, TandemError, Unavailable

if TYPE_CHECKING:
    from tandem.cluster import Cluster

_LOOK_S = 1.0
_DOWN_S = 45.0


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once. The old handlers come back at the end."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def check_model(config: Config) -> None:
    """Raises ModelError, saying what to do, before anything is started for a model that isn't there."""
    from tandem.model_files import resolve_model

    resolve_model(config.model.path)


def serve(
    config_path: ConfigOption = None,
    model: Annotated[str, typer.Option(help="A pulled model's name, a GGUF file or a Hugging Face directory.")] = "",
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds until the whole cluster must be ready.")] = 180.0,
    address: Annotated[
        str, typer.Option(help="The head of a Ray that runs already, as `ray start` says it. Default: one of its own.")
    ] = "",
) -> None:
    """Run a whole cluster in the foreground; Ctrl-C or `tandem down` stops all of it."""
    from tandem.cluster import Cluster, check_replicas, remove_stale_ray_dir

    config = load_config(config_path, {"model": {"path": model}} if model else None)
    check_replicas(config)
    check_model(config)
    run_file = RunFile(config.run_path)
    left_behind = run_file.acquire()
    try:
        if left_behind is not None:
            remove_stale_ray_dir(left_behind.ray_dir)
        with stop_on_signals() as stop, Cluster(config, credentials=given()) as cluster:
            run_file.write(cluster.target)
            cluster.start(
                progress=say,
                timeout_s=timeout_s,
                stop=stop,
                on_ray_dir=lambda path: run_file.write(cluster.target, str(path)),
                address=address,
            )
            say(f"ready: {cluster.target} serves {config.model.path}; logs are in {cluster.log_dir}")
            supervise_until(stop, cluster, run_file)
            say("stopping")
        say("stopped")
    finally:
        run_file.release()


def supervise_until(stop: threading.Event, cluster: Cluster, run_file: RunFile) -> None:
    """Keeps a cluster as it is wanted until `stop`, says what happens, and shows its state where stdout is a terminal."""
    target = cluster.target
    with _live_table(cluster.config) as show:
        while not stop.wait(_LOOK_S):
            for line in cluster.supervise():
                say(line)
            if cluster.target != target:  # a router is on another node
                target = cluster.target
                run_file.write(target)
            show(target)


def say(line: str) -> None:
    stdout.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _live_table(config: Config) -> Iterator[Callable[[str], None]]:
    """What shows the cluster's state below the lines said so far; nothing where stdout is no terminal."""
    if not stdout.is_terminal:
        yield lambda target: None
        return
    with Live(console=stdout, auto_refresh=False) as live:

        def show(target: str) -> None:
            try:
                with connect_own(config, target) as client:
                    live.update(cluster_table(client.cluster(timeout_s=_LOOK_S)), refresh=True)
            except TandemError:
                return  # the router is being started again; supervise says so

        yield show


def down(
    config_path: ConfigOption = None,
    address: Annotated[str, typer.Option(help="Of a Ray: stop the cluster that `tandem up` runs there.")] = "",
) -> None:
    """Stop the cluster that `tandem serve` runs in the configured run folder, or that `tandem up` runs on a Ray, and wait until
    it is gone."""
    config = load_config(config_path)
    if address:
        from tandem.cluster import stop_lasting

        if not (stopped := stop_lasting(config, address)):
            raise Unavailable(f"no cluster {config.cluster!r} runs on the Ray at {address}")
        print(f"stopped {', '.join(stopped)}")
        return
    run_file = RunFile(config.run_path)
    running = run_file.read()
    if running is None:
        raise Unavailable(f"no cluster {config.cluster!r} runs here (looked at {run_file.path})")
    os.kill(running.pid, signal.SIGTERM)
    deadline_s = now_s() + _DOWN_S
    while run_file.read() is not None:
        if now_s() > deadline_s:
            raise DeadlineExceeded(f"process {running.pid} did not stop within {_DOWN_S:.0f} s")
        time.sleep(0.05)
    print(f"stopped process {running.pid} that served at {running.target}")


def status(config_path: ConfigOption = None, target: TargetOption = "", as_json: JsonOption = False) -> None:
    """Show what runs where. Exit code 0 only if the cluster is ready."""
    with connect(target, config_path) as client:
        cluster = client.cluster()
    if as_json:
        print_json(as_dict(cluster))
    else:
        stdout.print(cluster_table(cluster))
        for line in link_lines(cluster):
            print(line)
        print(
            f"model {cluster.model}, up to {cluster.max_model_len} tokens, blocks of {cluster.block_size}; "
            f"{cluster.num_requests_finished} requests finished, {cluster.num_requests_failed} failed, "
            f"{cluster.num_requests_cancelled} cancelled"
        )
        if cluster.wanted.revision:
            wanted = cluster.wanted
            print(f"wanted: {wanted.prefill} prefill and {wanted.decode} decode workers ({wanted.reason})")
    if not cluster.ready:
        raise typer.Exit(1)
