"""`python -m router --config FILE`: one router in the foreground."""

from __future__ import annotations

from tandem.role_main import role_main

if __name__ == "__main__":
    role_main("router", "router")
