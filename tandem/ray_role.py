"""What Ray runs in a process of its own: one role.

Owns that process: its output, its configuration, its address, and what it says of itself. Ray pickles its own arguments: all are
plain strings here.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.config import Config, load_config, router_number
from tandem.errors import TandemError
from tandem.logs import configure
from tandem.role_main import load_role
from tandem.stop import Stop

log = logging.getLogger(__name__)

_KEPT = frozenset({"TANDEM_CACHE", "TANDEM_KERNELS"})
"""Variables of our own that are no part of the configuration."""


class RoleProcess:
    """One role, on a thread, so that `info` and `stop` answer while it works.

    When Ray restarts the process, it constructs this again, with the same arguments: the role comes back under its name. With
    `binds_node` it listens on the address of the node that it is on now, whichever that is.
    """

    def __init__(
        self, entry_point: str, role: str, name: str, config_yaml: str, log_path: str, place: str, binds_node: str
    ) -> None:
        _write_output_to(log_path)
        # The string is the whole configuration: the environment was merged into it where the cluster was started.
        for variable in [key for key in os.environ if key.startswith("TANDEM_") and key not in _KEPT]:
            del os.environ[variable]
        self._role = role
        self._name = name
        self._place = place
        self._stop = Stop()
        self._error: tuple[str, str] | None = None
        self._target = ""
        address = ray_module().util.get_node_ip_address() if binds_node else ""
        self._thread = threading.Thread(
            target=self._run, args=(entry_point, config_yaml, log_path, address), name=name, daemon=True
        )
        self._thread.start()

    def _run(self, entry_point: str, config_yaml: str, log_path: str, address: str) -> None:
        try:
            config = at_address(_parse_config(config_yaml), address) if address else _parse_config(config_yaml)
            if self._role == "router":
                self._target = config.router.replica(router_number(self._name)).grpc_target
            configure(config.log.format, config.log.level, role=self._role, process=self._name)
            load_role(self._role, config, entry_point)(config, self._name, self._stop)
            if not self._stop.is_set():
                self._error = (TandemError.code, f"it ended by itself; its log is {log_path}")
        except TandemError as error:
            traceback.print_exc()
            self._error = (error.code, str(error))
        except BaseException as error:
            traceback.print_exc()
            self._error = (TandemError.code, f"{type(error).__name__}: {error}; its log is {log_path}")

    def info(self) -> str:
        """JSON: pid; code and message of the error that ended the role, or null; whether it was asked to stop, by us or by a
        router, and whether it has ended; a router's gRPC target; the node and the place where it is."""
        return json.dumps(
            {
                "pid": os.getpid(),
                "error": self._error,
                "stopping": self._stop.is_set(),
                "ended": not self._thread.is_alive(),
                "target": self._target,
                "place": self._place,
                "node": ray_module().get_runtime_context().get_node_id(),
            }
        )

    def stop(self, timeout_s: str) -> bool:
        """Asks the role to stop and waits for it. Whether it did."""
        self._stop.set()
        self._thread.join(float(timeout_s))
        return not self._thread.is_alive()


def at_address(config: Config, address: str) -> Config:
    """The configuration of a role that listens on `address`."""
    return config.model_copy(
        update={
            "router": config.router.model_copy(update={"host": address}),
            "transfer": config.transfer.model_copy(update={"host": address}),
        }
    )


def _parse_config(text: str) -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


def _write_output_to(path: str) -> None:
    """Sends this process's stdout and stderr to the end of `path`, those of native code too."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def ray_module() -> Any:
    """The `ray` module. Ray reads its environment when it is first imported, so that must not happen elsewhere: no usage
    statistics leave this machine, and a secret keeps others out of its ports: that of the environment or of the user's file where
    there is one, else one of this process."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    import ray._private.worker
    import ray.util.scheduling_strategies

    # What Ray tells its driver of killed processes would land in the middle of what a command writes to stdout.
    ray._private.worker.print_to_stdstream = _log_ray_message
    return ray


def _log_ray_message(data: Mapping[str, Any], **_: object) -> None:
    log.info("Ray: %s", " ".join(str(line) for line in data["lines"]))
