"""What a process writes to its log: one line an event, as `key=value` or as JSON.

Owns the form of a line. A line has when, how bad, of which role and process, from which module, and, where there is one, the
request and the attempt that it is about (`extra=about(…)`). Never a prompt, a text, token ids or keys: whoever logs sees to that.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Literal

Form = Literal["text", "json"]
_OURS = ("decode_worker", "kernels", "kvpool", "prefill_worker", "protos", "router", "tandem")
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")
"""ASCII that can be seen, but for a quote, an equals sign and a backslash."""


def configure(form: Form, level: str, *, role: str, process: str) -> None:
    """Sends what this process logs to stderr, in that form. Our own modules log from `level` on, those of others from INFO on,
    or from `level` where that is worse: what they tell in detail may hold what is nobody's business."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(form, role=role, process=process))
    logging.basicConfig(level=max(logging.INFO, logging.getLevelName(level)), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


def about(request_id: str, attempt: int | None = None) -> dict[str, object]:
    """What `extra` of a log call is, where that is about a request."""
    return {"request_id": request_id} if attempt is None else {"request_id": request_id, "attempt": attempt}


class LineFormatter(logging.Formatter):
    """One line of each record, its traceback included."""

    def __init__(self, form: Form, *, role: str, process: str) -> None:
        super().__init__()
        self._form = form
        self._who = {"role": role, "process": process}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            **self._who,
            "logger": record.name,
        }
        for name in ("request_id", "attempt"):
            if (value := getattr(record, name, None)) is not None:
                fields[name] = value
        fields["message"] = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._form == "json":
            return json.dumps(fields)
        return " ".join(f"{name}={_shown(value)}" for name, value in fields.items())


def _shown(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
