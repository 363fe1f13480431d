"""The configuration: one YAML file, overridden by the environment, validated once, frozen.

Owns every option, its default and its limits. Environment variables are `TANDEM_` and the key with `__` between levels
(`TANDEM_DECODE__ARENA_BYTES=1073741824`). A wrong value is a `ConfigError` that names the key. Constructors elsewhere take the
few values they use, not this object.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from tandem.errors import ConfigError

GiB = 1024**3
MAX_CONFIG_BYTES = 256 * 1024
_MAX_SHOWN_CHARS = 200


def cache_dir() -> Path:
    """Where models and run files live: `$TANDEM_CACHE`, else `$XDG_CACHE_HOME/tandem`, else `~/.cache/tandem`."""
    if explicit := os.environ.get("TANDEM_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


def packed_dir() -> Path:
    """Where weights lie as workers map them."""
    return cache_dir() / "packed"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """What is served."""

    path: str = Field(
        "smollm2-135m", description="a name that `tandem pull` knows, a GGUF file or a Hugging Face directory"
    )
    name: str = Field("", description="the name clients use; empty: taken from the path")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of KV, and of weights unless `weights` says otherwise")
    weights: Literal["bf16", "int8", "int4"] | None = Field(
        None, description="how linears keep their weights in memory"
    )
    max_len: int = Field(0, ge=0, description="tokens of prompt and answer; 0: the model's own context")


class WorkerConfig(_Section):
    """One role's engine. Prefill and decode workers differ by these values, not by code."""

    replicas: int = Field(1, ge=0, le=64)
    arena_bytes: int = Field(1 * GiB, ge=2**20, description="KV memory of the DEVICE tier")
    block_size: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256] = Field(
        16, description="tokens of a block; the same for all workers of a cluster"
    )
    max_running: int = Field(64, ge=1, le=1024, description="sequences in one step")
    max_step_tokens: int = Field(
        512, ge=16, le=512, description="token budget of a step; 512 rows is what the probe covers"
    )
    recompute_limit_tokens: int = Field(
        256, ge=0, description="a sink recomputes at most this many tokens without asking"
    )
    threads: int = Field(1, ge=1, le=256)
    pin: bool = Field(
        True,
        description="each thread on a core of its own. Not where others compute on the same cores and can't be seen: workers of "
        "other network namespaces, as Pods are",
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="a worker that is told to end gives back what it has not finished after so long",
    )


class DiskConfig(_Section):
    """The DISK tier of a pool node. Each directory belongs to one node alone."""

    dirs: list[str] = Field(default=[], max_length=16, description="one for each drive; empty: no DISK tier")
    bytes: int = Field(8 * GiB, ge=2**20, description="preallocated in each directory")
    policy: Literal["write-through", "after-hits", "write-back"] = Field(
        "write-through",
        description="blocks of the HOST tier are written at once, after `hits` uses, or when it runs short of room",
    )
    hits: int = Field(2, ge=1, le=1000)
    write_bytes_per_s: int = Field(0, ge=0, description="at most so fast, to spare the drives; 0: no limit")
    read_ahead_blocks: int = Field(32, ge=0, le=4096, description="brought up after what somebody asked for")


class PoolConfig(_Section):
    """The pool node of each machine."""

    replicas: int = Field(1, ge=0, le=2, description="copies of a block; the second is on another machine. 0: no pool")
    host_bytes: int = Field(2 * GiB, ge=2**20, description="KV memory of the HOST tier")
    eviction: Literal["lru", "lfu"] = Field("lru", description="what goes first: used longest ago, or least often")
    quota: float = Field(
        1.0, gt=0, le=1, description="part of a tier that one tenant's blocks may take while others need room"
    )
    ttl_s: float = Field(
        0.0, ge=0, description="blocks that nobody used for so long go; 0: they stay while there is room"
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="a pool node that is told to end writes for so long what the disk should have",
    )
    disk: DiskConfig = DiskConfig()


class LimitsConfig(_Section):
    """What a request may ask for; past it the answer is INVALID_ARGUMENT or RESOURCE_EXHAUSTED with the limit."""

    max_prompt_bytes: int = Field(4 * 2**20, ge=1)
    max_tokens: int = Field(32_768, ge=1, description="generated tokens of one sample")
    default_max_tokens: int = Field(256, ge=1)
    max_samples: int = Field(16, ge=1, le=64)
    max_stop_strings: int = Field(16, ge=0)
    max_stop_bytes: int = Field(256, ge=1, description="UTF-8 bytes of one stop string")
    max_logprobs: int = Field(20, ge=0, le=100)
    max_grammar_bytes: int = Field(65_536, ge=0, le=2**20, description="UTF-8 bytes of a grammar; 0: none is taken")
    max_active_requests: int = Field(1024, ge=1, description="accepted and not finished")
    default_deadline_s: float = Field(600.0, gt=0)
    client_patience_s: float = Field(30.0, gt=0, description="a client that reads nothing for so long is cut off")


class SloConfig(_Section):
    """What a class of requests is promised. It orders those that wait; only with `router.reject_late` is it a limit."""

    ttft_s: float = Field(2.0, gt=0, le=86_400, description="to the first token")
    ttft_per_1k_tokens_s: float = Field(
        1.0, ge=0, le=86_400, description="more for each thousand prompt tokens that nobody holds"
    )
    tpot_s: float = Field(0.0, ge=0, le=3600, description="each token after the first; 0: nothing is promised")


PORT_STEP = 10
"""Between the ports of one router and those of the next one on the same machine."""


class RouterTlsConfig(_Section):
    """What the routers' gRPC and HTTP ports prove themselves with, PEM files: `cert` and `key`, or neither."""

    cert: str = Field("", description="the certificate, and those between it and its authority")
    key: str = ""
    ca: str = Field("", description="clients must have a certificate of this authority; empty: they need none")


class RouterConfig(_Section):
    """The front door and the control plane."""

    replicas: int = Field(
        1, ge=1, le=16, description="routers on this machine; each next one listens on ports that are higher by 10"
    )
    host: str = Field("127.0.0.1", description="the address it binds: loopback unless you say otherwise")
    addresses: list[str] = Field(
        default=[],
        max_length=64,
        description="where workers and pool nodes reach the routers, `host` or `host:control_port` each; empty: on this machine",
    )
    grpc_port: Annotated[int, Field(ge=0, le=65_535)] = 8050
    control_port: Annotated[int, Field(ge=0, le=65_535)] = 8051
    admin_port: Annotated[
        int, Field(ge=0, le=65_535, description="HTTP for those who run the cluster: metrics, admin calls; 0: off")
    ] = 8052
    http_port: Annotated[int, Field(ge=0, le=65_535, description="HTTP for clients: OpenAI's API; 0: off")] = 8053
    secret_file: str = Field(
        "",
        description="what resume tickets are signed with, the same for all routers of a cluster; empty: a file in the run "
        "folder, made by the router that comes first",
    )
    keys_file: str = Field(
        "",
        description="the API keys, which `tandem keys` writes, with their tenants; empty: whoever reaches a port may ask",
    )
    allow_anonymous: bool = Field(False, description="listen on another address than loopback though there are no keys")
    tls: RouterTlsConfig = RouterTlsConfig()
    heartbeat_s: float = Field(0.25, gt=0, le=10)
    liveness_s: float = Field(2.0, gt=0, le=60, description="without a heartbeat for so long a process is lost")
    progress_s: float = Field(60.0, gt=0, description="a step that takes longer counts as a death")
    max_attempts: int = Field(3, ge=1, le=10, description="dispatches of one role before the request fails")
    interactive: SloConfig = SloConfig()
    batch: SloConfig = SloConfig(ttft_s=60.0)
    reject_late: bool = Field(False, description="refuse at once what can't be kept, with the time to retry after")
    max_index_keys: int = Field(
        4_000_000, ge=1_000, le=1_000_000_000, description="blocks that the prefix index knows; some 100 bytes each"
    )

    def replica(self, number: int) -> RouterConfig:
        """What router `number` of this machine listens on: one router, with its own ports."""
        shifted = {key: port + number * PORT_STEP for key in ROUTER_PORTS if (port := getattr(self, key))}
        return self.model_copy(update={"replicas": 1, **shifted})

    def private(self) -> RouterConfig:
        """On free ports of this machine alone, without keys and TLS: for whoever starts a cluster for a while."""
        off = {"grpc_port": 0, "control_port": 0, "http_port": 0, "admin_port": 0, "keys_file": ""}
        return self.model_copy(update={"host": "127.0.0.1", "tls": RouterTlsConfig(), **off})

    @property
    def control_endpoints(self) -> list[str]:
        """What workers and pool nodes dial: every router."""
        if not self.addresses:
            ports = [self.replica(number).control_port for number in range(self.replicas)]
            return [f"tcp://{_bracketed(self.host)}:{port}" for port in ports]
        return [f"tcp://{_with_port(address, self.control_port)}" for address in self.addresses]

    @property
    def grpc_target(self) -> str:
        """Where a client on this machine reaches the routers here: `host:port` of each, with commas between."""
        host = _dialled(self.host)
        return ",".join(f"{_bracketed(host)}:{self.replica(number).grpc_port}" for number in range(self.replicas))


ROUTER_PORTS = ("grpc_port", "control_port", "admin_port", "http_port")
"""The keys of `router` that are ports; 0 means any free one for the first two, and off for the others."""


def router_name(number: int) -> str:
    """What router `number` of a machine is called."""
    return f"router-{number}" if number else "router"


def router_number(name: str) -> int:
    """Which router of its machine one of this name is. Raises ConfigError for a name that tells no number."""
    base, dash, number = name.partition("-")
    if base != "router" or not (number.isdecimal() if dash else not number):
        raise ConfigError(
            f"--name: {name!r} is no router's; the first is 'router', the others 'router-1', 'router-2', …"
        )
    return int(number or 0)


def _dialled(host: str) -> str:
    """Where to reach on this machine who listens on `host`: on all of its addresses, perhaps."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return ("127.0.0.1" if address.version == 4 else "::1") if address.is_unspecified else host


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _with_port(address: str, port: int) -> str:
    """`host:port` of an address that may have a port of its own; an IPv6 address with one is in brackets."""
    host, colon, own = address.rpartition(":")
    if colon and own.isdigit() and (":" not in host or host.endswith("]")):
        return address
    return f"{_bracketed(address)}:{port}"


class PlannerConfig(_Section):
    """How many workers there are to be, where that follows from the load (`tandem.scaling`)."""

    enabled: bool = Field(False, description="the numbers of workers follow the load, within these bounds")
    ttft_s: float = Field(0.3, gt=0, le=3600, description="to the first token, for 9 requests in 10")
    ttft_per_1k_tokens_s: float = Field(
        0.3, ge=0, le=3600, description="more for each thousand prompt tokens that nobody holds"
    )
    tpot_s: float = Field(0.05, gt=0, le=3600, description="each token after the first")
    min_prefill: int = Field(1, ge=1, le=64)
    max_prefill: int = Field(8, ge=1, le=64)
    min_decode: int = Field(1, ge=1, le=64)
    max_decode: int = Field(8, ge=1, le=64)
    max_workers: int = Field(0, ge=0, le=128, description="of both roles together; 0: no limit of its own")
    settle_s: float = Field(
        120.0, ge=5, le=86_400, description="workers that were not needed for so long are taken away"
    )
    start_s: float = Field(20.0, ge=0, le=3600, description="what a worker takes to start: so far it looks ahead")


class RayConfig(_Section):
    """What each role takes of a node's resources, by Ray's names: `{GPU: 1}`. A worker goes only where there is so much."""

    router: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    prefill: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    decode: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    pool: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}

    def needs(self, role: str) -> dict[str, float]:
        """Of a role."""
        found: dict[str, float] = getattr(self, role)
        return found


class TlsConfig(_Section):
    """What the tcp transport proves itself with, PEM files; all three or none. Both sides must have a certificate of `ca`."""

    cert: str = ""
    key: str = ""
    ca: str = ""


class TransferConfig(_Section):
    """How KV moves."""

    host: str = Field(
        "127.0.0.1",
        description="the address that a worker or pool node binds, and tells the others unless it has another",
    )
    advertised_host: str = Field(
        "",
        description="where others reach it, if that is another address: one of a Service or a proxy; the ports are the same",
    )
    transports: list[Literal["shm", "ucx", "tcp"]] = Field(
        default=["shm", "tcp"], description="by preference; empty: nothing is fetched, all is recomputed"
    )
    tls: TlsConfig = TlsConfig()
    peer_bytes_per_s: int = Field(0, ge=0, description="at most so much from each source; 0: no limit")
    machine_id: str = Field(
        "", max_length=128, description="processes with the same one share memory; empty: the system's"
    )
    lease_s: float = Field(5.0, gt=0, le=60)
    grace_s: float = Field(2.0, gt=0, le=60, description="how long a source parks keys that it has not heard of")
    hold_s: float = Field(
        10.0, gt=0, le=120, description="how long prefill keeps a finished prompt's blocks for decode"
    )
    fetch_timeout_s: float = Field(20.0, gt=0, description="a fetch that takes longer ends with what it has")


class LogConfig(_Section):
    """What each process writes to its log."""

    format: Literal["text", "json"] = Field("text", description="of a line: `key=value`, or a JSON object")
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="DEBUG tells of each request")


class TracingConfig(_Section):
    """Where traces of requests go, OTLP over HTTP. Headers for the collector come from `OTEL_EXPORTER_OTLP_HEADERS`."""

    endpoint: str = Field(
        "", pattern=r"^(https?://\S+)?$", description="as http://localhost:4318/v1/traces; empty: there are no traces"
    )
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="part of the requests that is traced, of those that come without a trace of their own",
    )


class ControlConfig(_Section):
    """Who may speak on the lines between the cluster's processes."""

    curve: str = Field(
        "",
        description="folder of keys that `tandem curve make` made; empty: lines are plain, and whoever reaches them is believed",
    )
    allow_plain: bool = Field(
        False, description="leave loopback without keys: only where nobody else reaches these addresses"
    )


class Config(BaseSettings):
    """Everything a cluster needs to know. Build it with `load_config`."""

    model_config = SettingsConfigDict(env_prefix="TANDEM_", env_nested_delimiter="__", extra="forbid", frozen=True)

    cluster: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9-]{0,30}$", description="names run files; one cluster a name"
    )
    run_dir: str = Field(
        "", description="sockets and run files; empty: a folder of the cluster's name in the cache folder"
    )
    model: ModelConfig = ModelConfig()
    prefill: WorkerConfig = WorkerConfig()
    decode: WorkerConfig = WorkerConfig()
    pool: PoolConfig = PoolConfig()
    router: RouterConfig = RouterConfig()
    limits: LimitsConfig = LimitsConfig()
    transfer: TransferConfig = TransferConfig()
    tracing: TracingConfig = TracingConfig()
    log: LogConfig = LogConfig()
    control: ControlConfig = ControlConfig()
    planner: PlannerConfig = PlannerConfig()
    ray: RayConfig = RayConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    @property
    def run_path(self) -> Path:
        """The folder for this cluster's sockets and run files."""
        return Path(self.run_dir) if self.run_dir else cache_dir() / "run" / self.cluster


def _message(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        given = "" if item["type"] in ("missing", "extra_forbidden") else f" (given: {_shown(item['input'])})"
        text = "there is no such key" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{where}: {key}: {text}{given}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration from `path` (YAML; None: defaults), the environment, and `overrides` (nested; they win over the file).

    Raises ConfigError naming the file and the key.
    """
    data: dict[str, Any] = {}
    where = "configuration"
    if path is not None:
        where = str(path)
        data = _read_yaml(Path(path))
    data = merged(data, overrides or {})
    try:
        config = Config(**data)
    except ValidationError as error:
        raise ConfigError(_message(error, where)) from error
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from error
    if config.prefill.block_size != config.decode.block_size:
        raise ConfigError(
            f"{where}: prefill.block_size is {config.prefill.block_size} and decode.block_size is "
            f"{config.decode.block_size}; they must be equal"
        )
    planner = config.planner
    for role in ("prefill", "decode"):
        least, most = getattr(planner, f"min_{role}"), getattr(planner, f"max_{role}")
        if least > most:
            raise ConfigError(f"{where}: planner.min_{role} is {least}, planner.max_{role} is {most}")
    if 0 < planner.max_workers < planner.min_prefill + planner.min_decode:
        raise ConfigError(
            f"{where}: planner.max_workers is {planner.max_workers}, the fewest of both roles are "
            f"{planner.min_prefill + planner.min_decode}"
        )
    tls = config.transfer.tls
    if any((tls.cert, tls.key, tls.ca)) and not all((tls.cert, tls.key, tls.ca)):
        raise ConfigError(f"{where}: transfer.tls needs cert, key and ca, all three")
    _check_door(config.router, where)
    _check_lines(config, where)
    return config


def _check_lines(config: Config, where: str) -> None:
    """Raises ConfigError if others could speak as one of the cluster's processes."""
    if config.control.curve or config.control.allow_plain:
        return
    for key, host in (("router.host", config.router.host), ("transfer.host", config.transfer.host)):
        if not is_loopback(host):
            raise ConfigError(
                f"{where}: {key} is {host!r}, where other machines reach it, and the cluster's lines have no keys: set "
                "control.curve to a folder that `tandem curve make` made, or control.allow_plain to true if nobody else "
                "is on that network"
            )


def _check_door(router: RouterConfig, where: str) -> None:
    """Raises ConfigError for a front door that is open by mistake."""
    if bool(router.tls.cert) != bool(router.tls.key) or (router.tls.ca and not router.tls.cert):
        raise ConfigError(f"{where}: router.tls needs cert and key, both of them; ca alone does nothing")
    if not (is_loopback(router.host) or router.keys_file or router.allow_anonymous):
        raise ConfigError(
            f"{where}: router.host is {router.host!r}, which is not loopback, and there is no router.keys_file: whoever reached "
            "it could ask anything and run the cluster. Make keys with `tandem keys add` and name the file, or say "
            "router.allow_anonymous: true"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone. A name is not, but for `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class _NoAliases(yaml.SafeLoader):
    """A few lines with aliases of aliases stand for more than any memory holds, and nobody needs them here."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: has more than {MAX_CONFIG_BYTES} bytes")
    try:
        loaded = _NoAliases(text.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: the top level is a {type(loaded).__name__}, must be a mapping of names")
    return loaded


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in their places, mapping by mapping."""
    values = dict(base)
    for key, value in over.items():
        before = values.get(key)
        values[key] = merged(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return values


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
