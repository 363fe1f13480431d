"""A log is one line an event, in either form, whatever the event holds."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest

from tandem.logs import LineFormatter, about

PAIR = re.compile(r"(\w+)=(\"(?:[^\"\\]|\\.)*\"|\S+)(?: |$)")


def line_of(form: str, message: str, *args: object, error: BaseException | None = None, **extra: object) -> str:
    record = logging.LogRecord("router.server", logging.WARNING, "f.py", 1, message, args, None)
    record.created = 1_769_850_902.4812
    record.__dict__.update(extra)
    if error is not None:
        record.exc_info = (type(error), error, None)
    return LineFormatter(form, role="decode", process="decode-0").format(record)  # type: ignore[arg-type]


def read(form: str, line: str) -> dict[str, object]:
    if form == "json":
        found: dict[str, object] = json.loads(line)
        return found
    assert PAIR.sub("", line) == ""
    return {
        name: json.loads(value) if value.startswith('"') else int(value) if name == "attempt" else value
        for name, value in PAIR.findall(line)
    }


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_says_when_who_and_about_which_request(form: str) -> None:
    line = line_of(form, "%s dispatched to %s", "decode", "decode-1", **about("6f00", 2))
    assert read(form, line) == {
        "time": "2026-01-31T09:15:02.481Z",
        "level": "warning",
        "role": "decode",
        "process": "decode-0",
        "logger": "router.server",
        "request_id": "6f00",
        "attempt": 2,
        "message": "decode dispatched to decode-1",
    }


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "message", ["two\nlines", 'a "quote" = \\', "", "tab\there", "größer", "\x1b[31mred\x85\u2028"]
)
def test_an_event_is_one_line_that_can_be_read_back(form: str, message: str) -> None:
    line = line_of(form, "%s", message, error=ValueError("of\ntwo lines"))
    assert len(line.splitlines()) == 1
    found = read(form, line)
    assert found["message"] == message
    assert "ValueError: of\ntwo lines" in str(found["traceback"])
    assert "attempt" not in found


def test_modules_of_others_do_not_tell_details() -> None:
    code = (
        "import logging; from tandem.logs import configure\n"
        "configure('text', 'DEBUG', role='router', process='router')\n"
        "logging.getLogger('router.server').debug('ours'); logging.getLogger('urllib3').debug('theirs')\n"
        "logging.getLogger('urllib3').info('news')\n"
        "configure('text', 'WARNING', role='router', process='router'); logging.getLogger('urllib3').info('more')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert [line.rpartition("message=")[2] for line in found.stderr.splitlines()] == ["ours", "news"]
