"""`python -m prefill_worker --config FILE --name prefill-0`: one prefill worker in the foreground."""

from __future__ import annotations

from tandem.role_main import role_main

if __name__ == "__main__":
    role_main("prefill", "prefill-0")
