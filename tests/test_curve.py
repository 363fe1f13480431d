"""Keys and the list of those that are let in; doors and lines between real sockets, and who may say what behind them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tandem import clock
from tandem.config import is_loopback, load_config
from tandem.curve import DOORS, AllowList, Door, Keyring, Member, load_keyring, make_keys
from tandem.errors import ConfigError, ProtocolError
from tandem.zap import Zap
from tandem.zmq_io import bounded_socket, receive_signed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def keys_of(folder: Path, name: str, role: str) -> Keyring:
    found = load_keyring(str(folder), name, role)
    assert found is not None
    return found


# --- files -------------------------------------------------------------------------------------------------------------


def test_made_keys_are_read_back_and_nobody_else_can_read_them(folder: Path) -> None:
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    router, worker = keys_of(folder, "router-1", "router"), keys_of(folder, "decode-3", "decode")
    assert router.allowed.router_key == router.public_key
    assert worker.allowed.member(worker.public_key) == Member("worker")
    assert keys_of(folder, "prefill-0", "prefill").public_key == worker.public_key, "a worker may change its role"
    assert worker.allowed.member("?" * 40) is None


def test_keys_are_never_replaced(folder: Path) -> None:
    before = (folder / "router.secret").read_bytes()
    with pytest.raises(ConfigError, match=r"router\.secret is there already"):
        make_keys(folder)
    assert (folder / "router.secret").read_bytes() == before


def test_a_process_with_a_key_of_its_own_speaks_with_no_other_and_as_no_other(folder: Path) -> None:
    make_keys(folder, ["decode-0"])
    own, shared = keys_of(folder, "decode-0", "decode"), keys_of(folder, "decode-1", "decode")
    allowed = own.allowed
    assert own.public_key != shared.public_key
    assert allowed.speaker(own.public_key, "decode-0") == Member("worker", "decode-0")
    assert allowed.speaker(own.public_key, "decode-1") is None
    assert allowed.speaker(shared.public_key, "decode-0") is None
    assert allowed.speaker(shared.public_key, "decode-1") == Member("worker")


@pytest.mark.parametrize("name", ["router-1", "cook-0", "decode-0 x", "pool-/../x", ""])
def test_only_workers_and_pool_nodes_have_keys_of_their_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no process that has a key of its own"):
        make_keys(tmp_path / "keys", [name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "worker.secret").unlink(), "worker.secret can't be read"),
        (lambda f: (f / "worker.secret").chmod(0o644), "mode 0644: others may read it"),
        (lambda f: (f / "worker.secret").write_text("secret"), "holds no secret key"),
        (lambda f: (f / "worker.secret").write_bytes(b"\xff" * 40), "is not ASCII"),
        (lambda f: (f / "worker.secret").write_text("x" * 1000), "more than 256 bytes"),
        (lambda f: (f / "worker.secret").write_bytes((f / "pool.secret").read_bytes()), "as a worker's"),
        (lambda f: (f / "allowed").unlink(), "allowed can't be read"),
        (lambda f: (f / "allowed").write_text(""), "names 0 keys of routers"),
        (lambda f: (f / "allowed").write_text((f / "allowed").read_text() * 2), "stands there twice"),
        (lambda f: (f / "allowed").write_text("king " + "0" * 40), "line 1 is 'king"),
        (lambda f: (f / "allowed").write_text("router " + "0" * 39), "is no public key"),
        (lambda f: (f / "allowed").write_text("router " + "~" * 40), "is no public key"),
        (lambda f: (f / "allowed").write_text(f"router {'0' * 40}\nrouter {'1' * 40}\n"), "names 2 keys of routers"),
        (lambda f: (f / "allowed").write_bytes(b"#" * (2**20 + 1)), "more than 1048576 bytes"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        load_keyring(str(folder), "decode-0", "decode")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_list_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("list") / "allowed"
    file.write_bytes(data)
    try:
        AllowList(file)
    except ConfigError:
        pass


def test_a_changed_list_holds_within_a_second_and_a_bad_one_never(folder: Path) -> None:
    time_s = 100.0
    with clock.replaced(lambda: time_s):
        worker = keys_of(folder, "decode-0", "decode")
        allowed, key = worker.allowed, worker.public_key
        whole = (folder / "allowed").read_text()
        without = "".join(line for line in whole.splitlines(keepends=True) if not line.startswith("worker"))
        (folder / "allowed").write_text(without)
        assert allowed.member(key) is not None, "it is looked at once a second"
        time_s += 1.0
        assert allowed.member(key) is None
        (folder / "allowed").write_text("nonsense")
        time_s += 1.0
        assert allowed.member(allowed.router_key) == Member("router"), "the list before a bad one holds"
        (folder / "allowed").write_text(whole)
        time_s += 1.0
        assert allowed.member(key) == Member("worker")


# --- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["router", "transfer"])
def test_leaving_loopback_without_keys_is_refused_unless_it_is_said(key: str) -> None:
    host = {key: {"host": "0.0.0.0"} | ({"allow_anonymous": True} if key == "router" else {})}
    with pytest.raises(ConfigError, match=rf"{key}\.host is '0\.0\.0\.0'.*tandem curve make.*control\.allow_plain"):
        load_config(overrides=host)
    assert load_config(overrides=host | {"control": {"curve": "keys"}})
    assert load_config(overrides=host | {"control": {"allow_plain": True}})
    assert load_config(overrides={key: {"host": "127.0.0.2"}})


def test_what_loopback_is() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "node-1", "", "fe80::1"]))


# --- doors -------------------------------------------------------------------------------------------------------------


class Gate:
    """A guarded ROUTER and the `Zap` that answers for it, turned by the test; dialled by sockets of another context."""

    def __init__(self, keys: Keyring, door: Door) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.outside: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.diallers: list[zmq.Socket[bytes]] = []
        self.zap = Zap(self.context, keys.allowed)
        self.socket = bounded_socket(self.context, zmq.ROUTER)
        keys.guard(self.socket, door)
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def dial(self, set_keys: Callable[[zmq.Socket[bytes]], object]) -> zmq.Socket[bytes]:
        dialler = bounded_socket(self.outside, zmq.DEALER)
        self.diallers.append(dialler)
        set_keys(dialler)
        dialler.connect(self.endpoint)
        dialler.send(b"hi", zmq.NOBLOCK)
        return dialler

    def hears(self, seconds: float) -> list[bytes] | None:
        """What somebody said, within `seconds`."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.zap.socket, zmq.POLLIN)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            ready = dict(poller.poll(20))
            if self.zap.socket in ready:
                self.zap.handle()
            if self.socket in ready:
                return receive_signed(self.socket)
        return None

    def hang_up(self) -> None:
        while self.diallers:
            self.diallers.pop().close(linger=0)

    def close(self) -> None:
        self.hang_up()
        self.outside.term()
        self.zap.close()
        self.context.destroy(linger=0)


@pytest.fixture
def gates(folder: Path) -> Iterator[Callable[[Door], Gate]]:
    made: list[Gate] = []

    def make(door: Door) -> Gate:
        role = "router" if door == "control" else "prefill"
        made.append(Gate(keys_of(folder, "router" if door == "control" else "prefill-0", role), door))
        return made[-1]

    yield make
    for gate in made:
        gate.close()


ROLE_OF = {"router": "router", "worker": "decode", "pool": "pool"}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("role", ROLE_OF)
def test_each_door_lets_in_its_roles_alone(gates: Callable[[Door], Gate], folder: Path, door: Door, role: str) -> None:
    gate = gates(door)
    keys = keys_of(folder, f"{ROLE_OF[role]}-0" if role != "router" else "router", ROLE_OF[role])
    server = keys_of(folder, "router", "router") if door == "control" else keys_of(folder, "prefill-0", "prefill")
    gate.dial(lambda socket: keys._dial(socket, server.public_key))
    if role in DOORS[door]:
        heard = gate.hears(20.0)
        assert heard is not None
        assert heard[0].decode() == keys.public_key
        assert heard[2:] == [b"hi"]
        assert gate.zap.num_refused == 0
    else:
        assert gate.hears(0.5) is None
        assert gate.zap.num_refused > 0


def stranger(socket: zmq.Socket[bytes], server: str) -> None:
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = server.encode()


def test_strangers_and_the_plain_are_not_heard_and_disturb_nobody(gates: Callable[[Door], Gate], folder: Path) -> None:
    gate = gates("control")
    router, worker = keys_of(folder, "router", "router"), keys_of(folder, "decode-0", "decode")
    gate.dial(lambda socket: None)  # no keys at all
    gate.dial(lambda socket: stranger(socket, router.public_key))
    gate.dial(lambda socket: stranger(socket, worker.public_key))  # a wrong server's key: no question even comes
    assert gate.hears(0.5) is None
    assert gate.zap.num_refused > 0
    gate.dial(worker.dial_router)
    assert gate.hears(20.0) is not None


def test_a_server_that_has_not_the_routers_secret_is_told_nothing(folder: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    impostor, dialler = bounded_socket(context, zmq.ROUTER), bounded_socket(context, zmq.DEALER)
    with impostor, dialler:
        impostor.curve_server = 1
        impostor.curve_secretkey = zmq.curve_keypair()[1]
        port = impostor.bind_to_random_port("tcp://127.0.0.1")
        keys_of(folder, "decode-0", "decode").dial_router(dialler)
        dialler.connect(f"tcp://127.0.0.1:{port}")
        dialler.send(b"hi", zmq.NOBLOCK)
        assert not impostor.poll(500)
    context.term()


def test_nobody_comes_in_while_nobody_answers(folder: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, worker = keys_of(folder, "router", "router"), keys_of(folder, "decode-0", "decode")
    server, dialler = bounded_socket(context, zmq.ROUTER), bounded_socket(context, zmq.DEALER)
    with server, dialler:
        router.guard(server, "control")
        port = server.bind_to_random_port("tcp://127.0.0.1")
        worker.dial_router(dialler)
        dialler.connect(f"tcp://127.0.0.1:{port}")
        dialler.send(b"hi", zmq.NOBLOCK)
        assert not server.poll(500)
    context.term()


def test_who_serves_blocks_is_dialled_by_a_key_that_the_list_gives_it(folder: Path) -> None:
    make_keys(folder, ["decode-0"])
    keys, router = keys_of(folder, "prefill-0", "prefill"), keys_of(folder, "router", "router")
    own = keys_of(folder, "decode-0", "decode").public_key
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with bounded_socket(context, zmq.DEALER) as socket:
        keys.dial(socket, "decode-0", own)
        keys.dial(socket, "decode-1", keys.public_key)
        for name, key in [
            ("decode-1", own),
            ("decode-0", keys.public_key),
            ("router", router.public_key),
            ("decode-1", ""),
        ]:
            with pytest.raises(ProtocolError, match="doesn't give it"):
                keys.dial(socket, name, key)
    context.term()


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_any_question_is_answered_or_ignored(frames: list[bytes]) -> None:
    class Nobody:
        def send_multipart(self, frames: list[bytes], flags: int) -> None:
            assert frames[4] == b"400", "nobody is on the list"

    class Empty:
        def member(self, key: str) -> None:
            return None

    zap = Zap.__new__(Zap)
    zap._allowed, zap.socket, zap._log_again_s, zap.num_refused = Empty(), Nobody(), float("inf"), 0  # type: ignore[assignment]
    zap.answer(frames)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_attempts_to_connect_leave_nothing_behind(gates: Callable[[Door], Gate], folder: Path) -> None:
    gate = gates("control")
    router = keys_of(folder, "router", "router")

    def attempt() -> None:
        gate.dial(lambda socket: None)
        gate.dial(lambda socket: stranger(socket, router.public_key))
        gate.hears(0.02)
        gate.hang_up()

    for _ in range(50):
        attempt()
    before = resident_bytes()
    for _ in range(300):
        attempt()
    assert gate.zap.num_refused > 0
    grown = resident_bytes() - before
    assert grown < 4 * 2**20, f"{grown} bytes more after 600 attempts"
