"""Clients over plain sockets: those that leave, those that read nothing, and those that send what they should not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from protos.control import Abort, TokenLogprobs, Tokens
from tests.router.fake_cluster import LONG, FakeWorker, reference, wait_for
from tests.router.http.conftest import HttpRouter

COMPLETIONS = "/v1/completions"


def request_of(body: bytes, path: str = COMPLETIONS, **headers: str) -> bytes:
    named = {"content-type": "application/json", "content-length": str(len(body))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"POST {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in named.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def asking(**fields: Any) -> bytes:
    return request_of(json.dumps({"prompt": LONG} | fields).encode())


def connected(router: HttpRouter, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", router.http_port), timeout=20)
    connection.sendall(data)
    return connection


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The answer on a connection that its server closes, or whose answer says how long it is."""
    with connection:
        data = b""
        while b"\r\n\r\n" not in data:
            part = connection.recv(65_536)
            assert part, data
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        while len(body) < int(headers.get("content-length", "0")):
            body += connection.recv(65_536)
        return int(status.split()[1]), headers, body


def error_of(router: HttpRouter, data: bytes) -> tuple[int, dict[str, Any]]:
    status, _, body = answer(connected(router, data))
    return status, json.loads(body)["error"]


def is_free(router: HttpRouter, worker: FakeWorker, num_aborts: int) -> None:
    wait_for(lambda: len(worker.seen(Abort)) == num_aborts)
    wait_for(lambda: not router.server.answers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_worker(router: HttpRouter, stream: bool) -> None:
    decode = router.add("decode-0", "decode", step_s=0.01)
    connection = connected(router, asking(max_tokens=1000, stream=stream))
    if stream:
        assert connection.recv(65_536)
    else:
        wait_for(lambda: bool(decode.dispatches))
    connection.close()
    is_free(router, decode, 1)


def test_a_client_of_several_prompts_that_leaves_frees_all_of_them(router: HttpRouter) -> None:
    decode = router.add("decode-0", "decode", step_s=0.01)
    connection = connected(router, asking(prompt=[LONG, LONG + "!", LONG + "?"], max_tokens=1000, stream=True))
    wait_for(lambda: len(decode.dispatches) == 3)
    connection.close()
    is_free(router, decode, 3)


def test_a_client_that_reads_nothing_is_cut_off_and_its_place_is_free(
    make_http_router: Callable[..., HttpRouter],
) -> None:
    tops = [(token_id, -1.5) for token_id in range(97, 117)]

    def tamper(message: Tokens) -> list[Tokens]:  # 1 KB a token
        logprobs = [TokenLogprobs(-0.5, tops) for _ in message.token_ids]
        return [
            Tokens(message.fence, message.index, message.position, message.token_ids, logprobs, message.finish_reason)
        ]

    router = make_http_router(limits={"client_patience_s": 0.5, "max_active_requests": 1})
    router.add("decode-0", "decode", tamper=tamper)
    messages = [{"role": "user", "content": LONG}]
    body = {"messages": messages, "max_tokens": 10_000, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": True}
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the kernel reads megabytes for it
        stuck.settimeout(20)
        stuck.connect(("127.0.0.1", router.http_port))
        stuck.sendall(request_of(json.dumps(body).encode(), "/v1/chat/completions"))
        assert stuck.recv(1)
        assert error_of(router, asking())[0] == 429
        wait_for(lambda: not router.server.answers, 60.0)
        rest = b""  # what the kernel had taken
        while part := stuck.recv(65_536):
            rest = rest[-100:] + part
    assert b"[DONE]" not in rest


def test_a_client_that_reads_slowly_is_not_cut_off(make_http_router: Callable[..., HttpRouter]) -> None:
    router = make_http_router(limits={"client_patience_s": 0.5})
    router.add("decode-0", "decode", step_s=0.05)
    connection = connected(router, asking(max_tokens=30, stream=True))  # takes three times as long
    data = b""
    while b"[DONE]" not in data:
        data += connection.recv(16)
    connection.close()
    pieces = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == reference(LONG, 30)


def test_a_stream_is_events_that_no_proxy_keeps(router: HttpRouter) -> None:
    router.add("decode-0", "decode")
    connection = connected(router, asking(max_tokens=2, stream=True))
    status, headers, _ = answer(connection)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert len(headers["x-request-id"]) == 24


def test_a_body_past_the_limit_is_refused_before_it_is_read(make_http_router: Callable[..., HttpRouter]) -> None:
    router = make_http_router(limits={"max_prompt_bytes": 1000})
    limit = router.server.max_body_bytes
    status, error = error_of(router, request_of(b"", content_length=str(limit + 1)))
    assert (status, error["message"]) == (
        413,
        f"POST {COMPLETIONS}: the body has {limit + 1} bytes, the limit is {limit}",
    )
    assert error["type"] == "invalid_request_error"

    connection = connected(router, request_of(b"", content_length="", transfer_encoding="chunked"))
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"

    def send() -> None:  # as much as is taken
        try:
            for _ in range(10 * limit // 65_536):
                connection.sendall(chunk)
        except OSError:
            pass

    sending = threading.Thread(target=send)
    sending.start()
    status, _, body = answer(connection)
    sending.join(20)
    assert not sending.is_alive()
    assert status == 413
    assert f"more than {limit} bytes" in json.loads(body)["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(make_http_router: Callable[..., HttpRouter]) -> None:
    router = make_http_router(limits={"client_patience_s": 0.3})
    status, error = error_of(router, request_of(b"", content_length="100") + b'{"prompt":')
    assert status == 408
    assert "not whole after 0.3 s" in error["message"]


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(
    router: HttpRouter, caplog: pytest.LogCaptureFixture
) -> None:
    connection = connected(router, request_of(b"", content_length="100"))
    connection.close()
    assert error_of(router, request_of(b"{}"))[0] == 400  # it goes on
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (request_of(b"{}", content_type="text/plain"), 415, "content type is 'text/plain', must be 'application/json'"),
        (request_of(b"{}", content_type=""), 415, "content type is ''"),
        (request_of(b"{"), 400, "not JSON"),
        (request_of(b'{"prompt": "\xff"}'), 400, "not UTF-8"),
        (request_of(b'{"prompt": "a", "user": ' + b"[" * 200_000), 400, "nested too deeply"),
        (request_of(b"{}", path="/v1/embeddings"), 404, "POST /v1/embeddings: Not Found"),
        (b"GET /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n", 405, "GET /v1/completions: Method Not Allowed"),
    ],
)
def test_what_is_no_request_is_refused(router: HttpRouter, data: bytes, status: int, message: str) -> None:
    found, error = error_of(router, data)
    assert found == status
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_defect_is_told_as_one_and_nothing_of_it_is_shown(
    router: HttpRouter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*args: object) -> None:
        raise RuntimeError("a secret")

    router.add("decode-0", "decode", step_s=0.01)
    monkeypatch.setattr("router.http.openai.answers.CompletionAnswer.complete", defect)
    connection = connected(router, asking(max_tokens=3, stream=True))
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += connection.recv(65_536)
    connection.close()
    last = data.split(b"event: error\n")[1]
    assert b'"type":"server_error"' in last
    assert b"secret" not in data
    assert b"[DONE]" not in data
    monkeypatch.setattr("router.http.openai.routes.completion_asked", defect)
    status, error = error_of(router, asking(max_tokens=3))
    assert (status, error["type"]) == (500, "server_error")
    assert "secret" not in error["message"]
    assert any(record.exc_info and "stream" in record.getMessage() for record in caplog.records)


def test_a_router_that_stops_ends_its_streams_with_an_error(make_http_router: Callable[..., HttpRouter]) -> None:
    router = make_http_router(drain_s=0.2)
    router.add("decode-0", "decode", step_s=0.01)
    connection = connected(router, asking(max_tokens=10_000, stream=True))
    data = connection.recv(65_536)
    router.stop.set()
    while part := connection.recv(65_536):
        data += part
    connection.close()
    assert b"event: error\n" in data
    assert b"the router is stopping" in data
