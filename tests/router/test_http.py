"""The HTTP ports over real sockets: whose path is whose, and how refusals are worded."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.router.fake_cluster import Router, wait_for
from tests.system.harness import free_port


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture
def router(make_router: Callable[..., Router]) -> tuple[Router, str, str]:
    ports = free_port(), free_port()
    router = make_router(router={"http_port": ports[0], "admin_port": ports[1]})
    return router, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"


def test_health_says_whether_a_request_can_be_served(router: tuple[Router, str, str]) -> None:
    server, client, admin = router
    assert get(f"{client}/health") == (503, {"ready": False})
    for url in (client, admin):
        assert get(f"{url}/alive") == (200, {"live": True})
    server.add("decode-0", "decode")
    for url in (client, admin):
        wait_for(lambda url=url: get(f"{url}/health") == (200, {"ready": True}))


def test_the_served_model_is_listed(router: tuple[Router, str, str]) -> None:
    _, client, _ = router
    status, listed = get(f"{client}/v1/models")
    assert status == 200
    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [("fake", "model")]


def test_each_port_has_its_own_paths_and_refuses_the_others(router: tuple[Router, str, str]) -> None:
    _, client, admin = router
    for url in (f"{client}/metrics", f"{admin}/v1/models"):
        status, body = get(url)
        assert status == 404
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["message"].startswith("GET /")
