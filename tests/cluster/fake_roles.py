"""Roles without a model, for tests of what starts and restarts them: a worker is a file in the run folder, and the router
lists those files."""

from __future__ import annotations

import os
import threading
from concurrent import futures
from typing import Any

import grpc

from protos import tandem_pb2 as pb
from protos import tandem_pb2_grpc
from router.wanted import Wanted
from tandem.config import Config, router_number
from tandem.errors import ModelError


class _Router(tandem_pb2_grpc.TandemServicer):
    def __init__(self, config: Config) -> None:
        self._config = config
        self._wanted = Wanted()

    def SetReplicas(self, request: pb.SetReplicasRequest, context: Any) -> pb.Replicas:
        self._wanted.set(request)
        return self._wanted.as_message()

    def GetCluster(self, request: pb.GetClusterRequest, context: Any) -> pb.GetClusterResponse:
        answer = pb.GetClusterResponse(router="router", ready=True, model="fake", wanted=self._wanted.as_message())
        for file in sorted(self._config.run_path.glob("*.worker")):
            answer.processes.add(name=file.stem, role=file.stem.split("-")[0], pid=int(file.read_text()))
        return answer


def run_router(config: Config, name: str, stop: threading.Event) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    tandem_pb2_grpc.add_TandemServicer_to_server(_Router(config), server)
    router = config.router.replica(router_number(name))
    server.add_insecure_port(f"{router.host}:{router.grpc_port}")
    server.start()
    stop.wait()
    server.stop(0).wait()


def run_worker(config: Config, name: str, stop: threading.Event) -> None:
    file = config.run_path / f"{name}.worker"
    (config.run_path / f"{name}.host").write_text(config.transfer.host)
    file.write_text(str(os.getpid()))
    stop.wait()
    file.unlink()


def run_broken_worker(config: Config, name: str, stop: threading.Event) -> None:
    raise ModelError("weights.gguf: no tensor 'token_embd.weight'")


def run_stubborn_worker(config: Config, name: str, stop: threading.Event) -> None:
    (config.run_path / f"{name}.worker").write_text(str(os.getpid()))
    threading.Event().wait()


def run_absent_worker(config: Config, name: str, stop: threading.Event) -> None:
    stop.wait()


def run_once(config: Config, name: str, stop: threading.Event) -> None:
    """Works until there is a file `fail`, and fails at once where there is one."""
    file, fail = config.run_path / f"{name}.worker", config.run_path / "fail"
    if not fail.exists():
        file.write_text(str(os.getpid()))
        while not (fail.exists() or stop.wait(0.02)):
            pass
        file.unlink()
        if not stop.is_set():
            raise ModelError("it was told to fail")
    elif not stop.wait(1.0):  # alive for a while and never listed, like a worker that fails while it loads
        raise ModelError("it was told to fail")
