"""`python -m kvpool --config FILE --name pool-0`: one pool node in the foreground."""

from __future__ import annotations

from tandem.role_main import role_main

if __name__ == "__main__":
    role_main("pool", "pool-0")
