"""The live page over real sockets: its files, its feed, what it may ask; without a browser."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from router.http.live_page import FILES, HEADERS, TYPES
from tests.router.fake_cluster import LONG, Router, collect, wait_for
from tests.system.harness import free_port


@pytest.fixture
def ports(make_router: Callable[..., Router]) -> tuple[Router, int, int]:
    client, admin = free_port(), free_port()
    router = make_router(router={"http_port": client, "admin_port": admin}, limits={"client_patience_s": 1.0})
    router.add("prefill-0", "prefill")
    router.add("decode-0", "decode")
    return router, client, admin


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def watch(port: int) -> Iterator[dict[str, Any]]:
    """Messages of the feed, until the caller closes it."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", "/live")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def test_every_file_of_the_page_comes_with_its_type_and_the_policy(ports: tuple[Router, int, int]) -> None:
    _, client, admin = ports
    names = sorted(path.name for path in FILES.iterdir())
    assert all(any(name.endswith(suffix) for suffix in TYPES) for name in names)
    for port in (client, admin):
        for path in ("/", *(f"/page/{name}" for name in names)):
            status, headers, body = ask(port, path)
            assert status == 200, path
            assert headers["content-type"] == TYPES["." + (path.rpartition(".")[2] if "." in path else "html")]
            assert {name.lower(): value for name, value in HEADERS.items()}.items() <= headers.items()
            assert body == (FILES / (path.removeprefix("/page/").strip("/") or "index.html")).read_bytes()
            assert ask(port, path, if_none_match=headers["etag"])[0] == 304
            assert ask(port, path, if_none_match='"other"')[0] == 200
    assert ask(client, "/page/../apps.py")[0] == 404
    assert ask(client, "/page/%2e%2e%2fapps.py")[0] == 404


def test_the_page_names_no_other_host_and_has_no_inline_script() -> None:
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.MULTILINE), path.name
        if path.suffix == ".html":
            assert not re.search(r"\son\w+=|style=|<style|<script(?![^>]*\ssrc=)", text), path.name
        assert "innerHTML" not in text, path.name


def test_the_feed_tells_of_a_request_and_never_what_was_asked(ports: tuple[Router, int, int]) -> None:
    router, client, admin = ports
    answer = collect(router.ask(LONG, max_tokens=5))
    for port, is_admin in ((client, False), (admin, True)):
        feed = watch(port)
        first = next(feed)
        feed.close()
        assert (first["whole"], first["admin"]) == (True, is_admin)
        assert [request["id"] for request in first["requests"]] == [answer.accepted.request_id]
        assert first["requests"][0]["num_generated_tokens"] == 5
        told = json.dumps(first)
        assert "quick brown" not in told
        assert answer.text() not in told


def test_an_explanation_is_the_same_as_over_grpc(ports: tuple[Router, int, int]) -> None:
    router, client, _ = ports
    request_id = collect(router.ask(LONG, max_tokens=5)).accepted.request_id
    status, _, body = ask(client, f"/live/requests/{request_id}")
    explained = json.loads(body)
    assert status == 200
    assert {candidate["process"] for candidate in explained["decisions"][0]["candidates"]} == {"prefill-0", "decode-0"}
    assert explained["best_process"]
    status, _, body = ask(client, "/live/requests/nobody")
    assert status == 400
    assert "'nobody' is not among" in json.loads(body)["error"]["message"]


def test_an_audit_is_started_on_the_admin_port_alone_and_not_by_another_site(ports: tuple[Router, int, int]) -> None:
    _, client, admin = ports
    assert ask(client, "/live/audit", "POST", tandem_page="audit")[0] == 404
    assert ask(admin, "/live/audit", "GET", tandem_page="audit")[0] == 405
    assert ask(admin, "/live/audit", "POST")[0] == 400
    status, _, body = ask(admin, "/live/audit", "POST", tandem_page="audit")
    assert status == 200
    found = json.loads(body)
    assert found["ok"]
    assert all(check["ok"] for check in found["checks"])


def test_one_that_leaves_is_forgotten(ports: tuple[Router, int, int]) -> None:
    router, client, _ = ports
    feeds = [watch(client) for _ in range(3)]
    for feed in feeds:
        next(feed)
    assert router.server.live.num_watchers == 3
    for feed in feeds:
        feed.close()
    wait_for(lambda: router.server.live.num_watchers == 0)


def test_one_that_reads_nothing_loses_its_connection(ports: tuple[Router, int, int], monkeypatch: Any) -> None:
    router, client, _ = ports
    monkeypatch.setattr("router.live_feed.EVERY_S", 0.001)
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", client))
        stuck.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: router.server.live.num_watchers == 1)
        wait_for(lambda: router.server.live.num_watchers == 0, 60)
        # The listener's limit of the kernel's own: what is in its buffers doesn't keep the connection either.
        stuck.settimeout(60)
        with pytest.raises(ConnectionResetError):
            wait_for(lambda: not stuck.send(b"x"), 60)


def test_a_router_that_stops_ends_the_feed(ports: tuple[Router, int, int]) -> None:
    router, client, _ = ports
    feed = watch(client)
    next(feed)
    router.stop.set()
    assert len(list(feed)) < 60
