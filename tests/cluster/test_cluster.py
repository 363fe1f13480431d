"""The promises of `tandem.cluster`, with real Ray and real processes; roles without a model stand in for the real ones."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from protos import tandem_pb2 as pb
from tandem.client import Client
from tandem.cluster import Cluster, _Restarts, check_replicas, remove_stale_ray_dir
from tandem.config import Config, dump_config, load_config
from tandem.errors import Cancelled, ConfigError, DeadlineExceeded, ModelError, TandemError
from tandem.ports import with_free_ports
from tandem.ray_role import ray_module
from tandem.scaling.scaler import Counts

HERE = Path(__file__).parent
FAKES = {
    "router": "fake_roles:run_router",
    "prefill": "fake_roles:run_worker",
    "decode": "fake_roles:run_worker",
    "pool": "fake_roles:run_worker",
}


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        pause.wait(0.05)


def ray_dirs() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("tandem-ray-*"))


def living(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def config(tmp_path: Path) -> Config:
    router = {"replicas": 2, "grpc_port": 0, "control_port": 0, "http_port": 0, "admin_port": 0}
    return load_config(None, {"run_dir": str(tmp_path), "router": router})


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    before, shared, folders = set(psutil.pids()), set(Path("/dev/shm").iterdir()), ray_dirs()
    yield
    mine = {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE} - before
    assert not mine
    assert set(Path("/dev/shm").iterdir()) <= shared
    assert ray_dirs() <= folders


@pytest.fixture(autouse=True)
def workers_find_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent.parent)]))


def test_a_killed_role_comes_back_under_its_name_and_a_stopped_cluster_leaves_nothing(
    config: Config, tmp_path: Path, nothing_left_behind: None, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    with Cluster(config, entry_points=FAKES) as cluster:
        cluster.start(progress=said.append, timeout_s=60)
        placed = {process.name: process for process in cluster.processes()}
        assert set(placed) == {"router", "router-1", "prefill-0", "decode-0", "pool-0"}
        assert len({process.pid for process in placed.values()}) == 5
        assert {"prefill-0 is up", "decode-0 is up", "pool-0 is up"} <= set(said)
        assert cluster.supervise() == []

        os.kill(placed["decode-0"].pid, signal.SIGKILL)
        happened: list[str] = []

        def is_back() -> bool:
            happened.extend(cluster.supervise())
            return any(line.startswith("decode-0 is back as process") for line in happened)

        wait_for(is_back, "decode-0 comes back")
        after = {process.name: process.pid for process in cluster.processes()}
        assert after["decode-0"] not in (0, placed["decode-0"].pid)
        assert {name: pid for name, pid in after.items() if name != "decode-0"} == {
            name: process.pid for name, process in placed.items() if name != "decode-0"
        }
        wait_for(lambda: (tmp_path / "decode-0.worker").read_text() == str(after["decode-0"]), "the role runs again")
        assert cluster.target.count(",") == 1
        for target in cluster.target.split(","):
            with Client(target) as client:
                assert client.cluster().ready
    assert not list(tmp_path.glob("*.worker"))  # each role was asked to stop and did
    assert not any(living(pid) for pid in after.values())
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"{name}.log" for name in placed}
    assert capfd.readouterr().out == ""  # what Ray has to say of it is not mixed into a command's output


def test_a_role_that_can_not_start_says_its_own_sentence_and_everything_stops(
    config: Config, nothing_left_behind: None
) -> None:
    cluster = Cluster(config, entry_points=FAKES | {"decode": "fake_roles:run_broken_worker"})
    with pytest.raises(ModelError) as caught:
        cluster.start(timeout_s=60)
    assert str(caught.value) == "decode-0: weights.gguf: no tensor 'token_embd.weight'"


@pytest.mark.slow
def test_a_role_that_never_appears_is_named_at_the_deadline_and_one_that_will_not_stop_is_killed(
    config: Config, nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.cluster._STOP_S", 1.0)
    with Cluster(config, entry_points=FAKES | {"decode": "fake_roles:run_stubborn_worker"}) as cluster:
        cluster.start(timeout_s=60)
        pids = [process.pid for process in cluster.processes()]
        with pytest.raises(DeadlineExceeded, match="waiting for nobody-0"):
            cluster._wait(0.0, print, threading.Event(), {"nobody-0"})
    assert not any(living(pid) for pid in pids)


@pytest.mark.slow
def test_a_stop_while_starting_is_obeyed(config: Config, nothing_left_behind: None) -> None:
    stop = threading.Event()

    def stop_when_ray_runs(line: str) -> None:
        if "router" in line:
            stop.set()

    with pytest.raises(Cancelled, match="while the cluster was starting"):
        Cluster(config, entry_points=FAKES).start(progress=stop_when_ray_runs, stop=stop, timeout_s=60)


def test_a_killed_driver_takes_its_processes_along(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(with_free_ports(config)))
    code = (
        "import sys, threading; from tandem.cluster import Cluster; from tandem.config import load_config\n"
        f"cluster = Cluster(load_config(sys.argv[1]), entry_points={FAKES!r})\n"
        "cluster.start(timeout_s=60, on_ray_dir=lambda path: print(path, flush=True))\n"
        "print(*(process.pid for process in cluster.processes()), flush=True); threading.Event().wait()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            ray_dir = driver.stdout.readline().strip()
            pids = [int(pid) for pid in driver.stdout.readline().split()]
            assert len(pids) == 5
            assert all(living(pid) for pid in pids)
        finally:
            driver.kill()
    wait_for(lambda: not any(living(pid) for pid in pids), "the roles die with their driver")
    assert Path(ray_dir).is_dir()
    remove_stale_ray_dir(ray_dir)
    assert not Path(ray_dir).exists()


def test_only_a_folder_of_our_own_making_is_removed(tmp_path: Path) -> None:
    for name in ("tandem-ray-x", "other"):
        (tmp_path / name).mkdir()
        remove_stale_ray_dir(str(tmp_path / name))
        assert (tmp_path / name).is_dir()


def test_free_ports_are_chosen_only_where_none_is_given(config: Config) -> None:
    chosen = with_free_ports(config).router
    assert chosen.grpc_port
    assert chosen.control_port
    assert chosen.grpc_port != chosen.control_port
    fixed = load_config(None, {"router": {"grpc_port": 1234, "control_port": 1235}})
    assert with_free_ports(fixed) == fixed


def test_a_second_cluster_in_one_process_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_module(), "is_initialized", lambda: True)
    with pytest.raises(TandemError, match="one cluster per process"):
        Cluster(config)._start_ray(None, "")


@pytest.mark.parametrize("key", ["grpc_port", "control_port", "http_port", "admin_port"])
def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        ports = {"grpc_port": 0, "control_port": 0, "http_port": 0, "admin_port": 0} | {key: port}
        config = load_config(None, {"run_dir": str(tmp_path / "run"), "router": ports})
        with pytest.raises(
            ConfigError, match=rf"router\.{key}: can't listen on 127\.0\.0\.1:{port}: Address already in use"
        ):
            Cluster(config).start()
    assert not (tmp_path / "run").exists()


def test_two_keys_with_one_port_are_named(config: Config) -> None:
    free = with_free_ports(config).router
    same = load_config(None, {"router": {"grpc_port": free.grpc_port, "control_port": free.grpc_port}})
    with pytest.raises(ConfigError, match=rf"router.control_port is {free.grpc_port}, and so is router.grpc_port"):
        Cluster(same).start()


def test_a_cluster_without_a_decode_worker_is_refused() -> None:
    config = load_config(None, {"decode": {"replicas": 0}})
    for refuse in (Cluster, check_replicas):
        with pytest.raises(ConfigError, match=r"decode\.replicas is 0, must be at least 1"):
            refuse(config)


def test_the_workers_of_another_cluster_are_not_taken_for_ours(config: Config, tmp_path: Path) -> None:
    (tmp_path / "decode-0.worker").write_text("1")  # listed by the router, with a pid that is not ours
    absent = FAKES | {"decode": "fake_roles:run_absent_worker"}
    config = config.model_copy(update={"router": config.router.model_copy(update={"replicas": 1})})
    with Cluster(config, entry_points=absent) as cluster, pytest.raises(DeadlineExceeded, match="waiting for decode-0"):
        cluster.start(timeout_s=12)


def test_pauses_between_restarts_grow_to_half_a_minute_and_shrink_after_a_steady_run() -> None:
    restarts, time_s, pauses = _Restarts(), 100.0, []
    for pid in range(1, 9):
        pauses.append(restarts.plan(time_s))
        time_s += pauses[-1]
        restarts.done(time_s, pid)
        time_s += 1
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]
    assert restarts.plan(time_s + 100) == 0


def test_a_role_that_dies_at_once_is_never_called_back_and_is_started_ever_more_slowly(
    config: Config, tmp_path: Path
) -> None:
    with Cluster(config, entry_points=FAKES | {"decode": "fake_roles:run_once"}) as cluster:
        cluster.start(timeout_s=60)
        (tmp_path / "fail").touch()
        said: list[str] = []

        def third_end_is_said() -> bool:
            said.extend(cluster.supervise())
            return len(said) >= 3

        wait_for(third_end_is_said, "the role ends three times", timeout_s=40)
    again = "decode-0: it was told to fail; starting it again"
    assert said == [again, f"{again} in 1 s", f"{again} in 2 s"]


def test_as_many_workers_run_as_are_wanted_and_one_changes_its_role_in_its_place(
    config: Config, tmp_path: Path, nothing_left_behind: None
) -> None:
    with Cluster(config, entry_points=FAKES) as cluster:
        cluster.start(timeout_s=60)
        said: list[str] = []

        def workers() -> dict[str, int]:
            said.extend(cluster.supervise())
            return {p.name: p.pid for p in cluster.processes() if p.role in ("prefill", "decode")}

        before = workers()
        assert set(before) == {"prefill-0", "decode-0"}
        with Client(cluster.target) as client:
            shown = [Client(target).cluster().wanted for target in cluster.target.split(",")]
            assert [(each.prefill, each.decode, each.revision) for each in shown] == [(1, 1, 1)] * 2
            client.set_replicas(prefill=2)
            wait_for(lambda: set(workers()) == {"prefill-0", "prefill-1", "decode-0"}, "another prefill worker")
            wait_for(lambda: workers() and "prefill-1 is up" in said, "it is up")
            place = cluster._kept["prefill-1"].place

            client.set_replicas(prefill=1, decode=2, reason="long answers")
            wait_for(lambda: set(workers()) == {"prefill-0", "decode-0", "decode-1"}, "a worker changes its role")
            assert cluster._kept["decode-1"].place == place
            assert not (tmp_path / "prefill-1.worker").exists()  # it was asked to stop, and did
            wait_for(lambda: workers() and "decode-1 is up" in said, "it is up in its new role")

            client.set_replicas(decode=1)
            wait_for(lambda: set(workers()) == {"prefill-0", "decode-0"}, "one leaves")
        after = workers()
        assert cluster.supervise() == []
    assert after == before  # the others were left alone
    assert [line for line in said if line.startswith("wanted")] == [
        "wanted: 2 prefill and 1 decode workers (no reason given)",
        "wanted: 1 prefill and 2 decode workers (long answers)",
        "wanted: 1 prefill and 1 decode workers (no reason given)",
    ]
    assert "prefill-1 leaves: 2 prefill workers are too many, and decode starts in its place" in said


def test_a_router_that_forgot_is_told_and_two_that_disagree_end_with_one_word(config: Config) -> None:
    cluster = Cluster(config)
    told: list[tuple[Counts, int]] = []
    cluster._tell = lambda targets: told.append((cluster.wanted, cluster._revision))  # type: ignore[method-assign]

    def said(prefill: int, decode: int, revision: int) -> pb.GetClusterResponse:
        return pb.GetClusterResponse(wanted=pb.Replicas(prefill=prefill, decode=decode, revision=revision))

    assert cluster._follow([said(3, 2, 7), said(0, 0, 0)]) == [
        "wanted: 3 prefill and 2 decode workers (no reason given)"
    ]
    assert told == [(Counts(3, 2), 7)]
    assert cluster._follow([said(3, 2, 7), said(3, 2, 7)]) == []
    assert len(told) == 1
    cluster._follow([said(1, 2, 8), said(3, 4, 8)])
    assert told[1:] == [(cluster.wanted, 9)]
    assert cluster.wanted in (Counts(1, 2), Counts(3, 4))
