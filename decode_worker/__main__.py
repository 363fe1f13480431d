"""`python -m decode_worker --config FILE --name decode-0`: one decode worker in the foreground."""

from __future__ import annotations

from tandem.role_main import role_main

if __name__ == "__main__":
    role_main("decode", "decode-0")
