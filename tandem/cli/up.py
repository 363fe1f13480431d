"""`tandem up`: a cluster on a Ray that runs already, which outlives the command; and what the planner would do.

Owns the command line. What runs is `tandem.cluster`'s, what would be wanted is `tandem.scaling`'s.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from tandem.cli.common import ConfigOption, TargetOption, stdout
from tandem.cli.reach import connect_own, given, target_of
from tandem.cli.run_file import RunFile
from tandem.cli.serve import check_model, say, stop_on_signals, supervise_until
from tandem.client import targets_of
from tandem.clock import now_s
from tandem.config import Config, load_config
from tandem.errors import ConfigError

_LOOKS = 4
"""The first shows no rate, and it takes two more to want more workers."""


def up(
    config_path: ConfigOption = None,
    address: Annotated[str, typer.Option(help="The head of the Ray, as `ray start` says it.")] = "",
    model: Annotated[str, typer.Option(help="A pulled model's name, a GGUF file or a Hugging Face directory.")] = "",
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds until the whole cluster must be ready.")] = 180.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say, of a cluster that runs, what the planner would want now, and why."),
    ] = False,
    target: TargetOption = "",
) -> None:
    """Run a cluster on the nodes of a Ray that runs already, and keep it as it is wanted.

    It goes on when this command ends, and a new one finds what runs and disturbs nothing: `tandem down --address` stops it. Each
    role has a placement group of its own, on a node that has what `ray` in the configuration says; prefill and decode workers are
    on different nodes where there are several, a pool node on each machine.
    """
    config = load_config(config_path, {"model": {"path": model}} if model else None)
    if dry_run:
        explain_plan(config, target_of(target, config))
        return
    if not address:
        raise ConfigError("--address is missing: the head of a running Ray. `tandem serve` starts a Ray of its own")
    from tandem.cluster import Cluster, check_replicas, unprotected_head

    check_replicas(config)
    check_model(config)
    run_file = RunFile(config.run_path)
    run_file.acquire()
    try:
        with stop_on_signals() as stop, Cluster(config, credentials=given(), lasting=True) as cluster:
            cluster.start(progress=say, timeout_s=timeout_s, stop=stop, address=address)
            run_file.write(cluster.target)
            if why := unprotected_head():
                say(f"warning: {why}")
            for line in cluster.exposure():
                say(f"warning: {line}")
            say(f"ready: {cluster.target} serves {config.model.path}; logs are in {cluster.log_dir} of each machine")
            supervise_until(stop, cluster, run_file)
            say(
                f"the cluster goes on, and nobody looks after it until `tandem up`; `tandem down --address {address}` stops it"
            )
    finally:
        run_file.release()


def explain_plan(config: Config, target: str) -> None:
    """Looks at the cluster some times and prints what the planner would want at the end. Nothing is changed."""
    from tandem.cluster import PLAN_EVERY_S, scaler_of
    from tandem.scaling.look import look_of
    from tandem.scaling.scaler import Counts

    scaler = scaler_of(config)
    clients = [connect_own(config, one) for one in targets_of(target)]
    try:
        for number in range(_LOOKS):
            if number:
                time.sleep(PLAN_EVERY_S)
            clusters = [client.cluster() for client in clients]
            newest = max((cluster.wanted for cluster in clusters), key=lambda wanted: wanted.revision)
            roles = [process.role for process in clusters[0].processes if not process.draining]
            wanted = (
                Counts(newest.prefill, newest.decode)
                if newest.revision
                else Counts(roles.count("prefill"), roles.count("decode"))
            )
            plan = scaler.plan(look_of(clusters), wanted, now_s())
    finally:
        for client in clients:
            client.close()
    stdout.print(
        f"wanted now: {wanted.prefill} prefill and {wanted.decode} decode workers; "
        f"the planner would want {plan.wanted.prefill} and {plan.wanted.decode}"
        + ("" if config.planner.enabled else " (planner.enabled is false: it changes nothing)"),
        highlight=False,
        soft_wrap=True,
    )
    for reason in plan.reasons:
        stdout.print(f"  {reason}", highlight=False, markup=False, soft_wrap=True)
