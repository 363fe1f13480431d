"""A cluster whose lines have keys serves as one without; whoever has no key, a stranger's or one of another role gets nothing
from any port and disturbs nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from protos import control, kv_events
from protos.control import Capacity, Endpoints, Fetch, Goodbye, Hello
from tandem.curve import Keyring, load_keyring, make_keys
from tandem.drills.faults import resident_bytes
from tandem.drills.model import shallow
from tandem.zmq_io import bounded_socket, identity
from tests.system.harness import RunningCluster, wait_until
from tests.system.test_handover import prompt_of

pytestmark = pytest.mark.timeout(600)
NAMES = ("router", "pool-0", "prefill-0", "decode-0")
START_S = 240.0
MAX_GROWTH_BYTES = 8 * 2**20
ATTEMPTS = 150


def overrides(keys: Path) -> dict[str, object]:
    memory = 64 * 2**20
    return {
        "model": {"path": str(shallow("smollm2-135m", 2)), "name": "shallow"},
        "prefill": {"arena_bytes": memory},
        "decode": {"arena_bytes": memory},
        "pool": {"host_bytes": memory},
        "control": {"curve": str(keys)},
    }


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    make_keys(folder, ["prefill-0"])  # one with a key of its own
    return folder


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[RunningCluster]:
    cluster = RunningCluster(tmp_path_factory.mktemp("cluster"), overrides(keys), faults=[])
    try:
        cluster.launch(NAMES)
        cluster.wait_ready(NAMES, START_S)
        yield cluster
    finally:
        codes = cluster.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{cluster.logs()}"


def test_prompts_are_handed_over_and_kept(keyed: RunningCluster) -> None:
    before = keyed.status("pool-0").cached_blocks
    answer = keyed.generate(prompt_of(700, 1), max_tokens=8)
    assert answer.run("prefill").computed_tokens == 700
    assert answer.run("decode").fetched_tokens == 700
    assert len(answer.tokens[0]) == 8
    wait_until(lambda: keyed.status("pool-0").cached_blocks >= before + 43, 30, "the pool node fetched the prompt")
    wait_until(lambda: keyed.client.audit().ok, 30, "the router believes what its processes report")


def ports(cluster: RunningCluster) -> dict[str, dict[str, str]]:
    """Of each process: its control, fetch, events and other ports, as others dial them."""
    found = {"router": {"control": f"tcp://127.0.0.1:{cluster.config.router.control_port}"}}
    for status in cluster.client.cluster().processes:
        tcp = {
            f"tcp://127.0.0.1:{connection.laddr.port}"
            for connection in psutil.Process(status.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        others = sorted(tcp - {status.fetch_endpoint, status.events_endpoint})
        found[status.name] = {"fetch": status.fetch_endpoint, "events": status.events_endpoint}
        found[status.name] |= {f"other-{number}": endpoint for number, endpoint in enumerate(others)}
    return found


def say_everything(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: Keyring | None, server: str
) -> list[zmq.Socket[bytes]]:
    """Dials a port as a worker, a sink, one who lost events and one who follows them, and says what these say."""
    lines = []
    endpoints = Endpoints(
        "tcp://127.0.0.1:9", "tcp://127.0.0.1:9", "tcp://127.0.0.1:9", key=keys.public_key if keys else ""
    )
    said: list[bytes] = [
        control.encode(Hello(1, "decode-0", "decode", b"intruder", 1, endpoints, Capacity(num_blocks=9), None)),
        control.encode(Goodbye("decode-0", b"intruder")),
        control.encode(Fetch(b"f" * 16, "r", [b"k" * 16], wait=False, deadline_s=9.0)),
    ]
    for kind in (zmq.DEALER, zmq.DEALER, zmq.SUB):
        line = bounded_socket(context, kind)
        if keys is not None:
            line.curve_publickey, line.curve_secretkey = keys._public, keys._secret
            line.curve_serverkey = server.encode()
        if kind == zmq.SUB:
            line.setsockopt(zmq.SUBSCRIBE, b"")
        else:
            line.setsockopt(zmq.IDENTITY, identity("decode-0", b"intruder"))
        line.connect(endpoint)
        lines.append(line)
    for data in said:
        lines[0].send(data, zmq.NOBLOCK)
    lines[1].send_multipart([b"", kv_events.encode_seq(0)], zmq.NOBLOCK)
    return lines


def strangers_keys(keys: Path) -> Keyring:
    _, secret = zmq.curve_keypair()
    trusted = load_keyring(str(keys), "pool-0", "pool")
    assert trusted is not None
    return Keyring(secret.decode(), trusted.allowed)


def servers_key(keys: Path, process: str) -> str:
    found = load_keyring(str(keys), process, process.partition("-")[0])
    assert found is not None
    return found.public_key


WRONG = {"control": ("router", "router"), "fetch": ("router", "router"), "events": ("decode-0", "decode")}
"""A member whose role each kind of port doesn't let in."""


@pytest.mark.parametrize("who", ["plain", "stranger", "wrong role"])
def test_intruders_get_nothing_and_disturb_nobody(keyed: RunningCluster, keys: Path, who: str) -> None:
    truth = keyed.generate(prompt_of(120, 2), max_tokens=8).tokens[0]
    epochs = {status.name: status.epoch for status in keyed.client.cluster().processes}
    with zmq.Context[zmq.Socket[bytes]]() as context:
        lines = []
        for process, endpoints in ports(keyed).items():
            for kind, endpoint in endpoints.items():
                intruder: Keyring | None = None
                if who == "stranger":
                    intruder = strangers_keys(keys)
                elif who == "wrong role":
                    if kind not in WRONG:
                        continue  # of the replay and the tcp port; tests/test_curve.py has all doors
                    intruder = load_keyring(str(keys), *WRONG[kind])
                lines += say_everything(context, endpoint, intruder, servers_key(keys, process))
        assert len(lines) >= 3 * 7
        poller = zmq.Poller()
        for line in lines:
            poller.register(line, zmq.POLLIN)
        # While they try, events are published and requests are answered.
        for _ in range(3):
            assert keyed.generate(prompt_of(120, 2), max_tokens=8).tokens[0] == truth
        assert poller.poll(1000) == []
        for line in lines:
            line.close()
    assert {status.name: status.epoch for status in keyed.client.cluster().processes} == epochs
    wait_until(lambda: keyed.client.audit().ok, 30, "the router believes what its processes report")


def test_attempts_to_connect_cost_no_memory(keyed: RunningCluster, keys: Path) -> None:
    stranger = strangers_keys(keys)

    def attempt(number: int) -> None:
        with zmq.Context[zmq.Socket[bytes]]() as context:
            lines = []
            for process, endpoints in ports_before.items():
                for endpoint in endpoints.values():
                    keyring = stranger if number % 2 else None
                    lines += say_everything(context, endpoint, keyring, servers_key_of[process])
            lines[0].poll(50)
            for line in lines:
                line.close()

    ports_before = ports(keyed)
    servers_key_of = {process: servers_key(keys, process) for process in ports_before}

    def measured() -> dict[str, int]:
        return {name: resident_bytes(process.pid) for name, process in keyed.processes.items()}

    for number in range(ATTEMPTS // 3):
        attempt(number)
    before = measured()
    for number in range(ATTEMPTS):
        attempt(number)
    more = {name: num_bytes - before[name] for name, num_bytes in measured().items()}
    assert max(more.values()) < MAX_GROWTH_BYTES, more
    assert len(keyed.generate(prompt_of(120, 3), max_tokens=4).tokens[0]) == 4


def test_a_worker_whose_key_is_not_on_the_list_is_told_so(keyed: RunningCluster, keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "others")
    (tmp_path / "others" / "allowed").write_text((keys / "allowed").read_text())
    keyed.set_own("decode-1", {"control": {"curve": str(tmp_path / "others")}})
    keyed.spawn("decode-1")
    process = keyed.processes.pop("decode-1")
    assert process.wait(START_S) == 1
    assert "doesn't name the key of decode-1" in (keyed.folder / "decode-1.log").read_text()


def test_a_worker_without_keys_never_joins(keyed: RunningCluster) -> None:
    keyed.set_own("decode-2", {"control": {"curve": ""}})
    keyed.spawn("decode-2")
    process = keyed.processes.pop("decode-2")
    try:
        log = keyed.folder / "decode-2.log"
        wait_until(lambda: "no router answers" in log.read_text(), START_S, "it dialled the router for some seconds")
        assert process.poll() is None
        assert "decode-2" not in {status.name for status in keyed.client.cluster().processes}
    finally:
        process.terminate()
        assert process.wait(60) == 0
