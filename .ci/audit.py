"""Asks for known faults of what constraints.txt pins (pip-audit), where a service that knows them can be reached.

Exit code 1 if there is one. Where nobody answers, or whoever answers knows none of the packages, it says that the check was left
out, and ends with 0: most machines that build this have no way to such a service.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60
IGNORED: dict[str, str] = {}
"""Faults that don't concern us, by their id, each with the reason."""


def audited(command: list[str]) -> list[dict[str, Any]] | str:
    """What is said of each package, or why nothing is."""
    asked = ["--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--format", "json", "--timeout", "5"]
    try:
        done = subprocess.run(
            [*command, *asked, "--progress-spinner", "off"],
            cwd=ROOT, timeout=DEADLINE_S, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {DEADLINE_S} s"
    except OSError as error:
        return str(error)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    return found if isinstance(found, list) else "its answer is no list"


def main() -> int:
    # A test names another program here.
    command = [os.environ["PIP_AUDIT"]] if "PIP_AUDIT" in os.environ else [sys.executable, "-m", "pip_audit"]
    found = audited(command)
    if isinstance(found, str):
        print(f"pip-audit: LEFT OUT, no service for known faults could be asked: {found}")
        return 0
    skipped = [entry["name"] for entry in found if "skip_reason" in entry]
    if len(skipped) == len(found):
        print(f"pip-audit: LEFT OUT, the index that was asked knows of none of the {len(found)} packages")
        return 0
    faults = [
        f"{entry['name']} {entry['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no version'}"
        for entry in found
        for fault in entry.get("vulns", [])
        if fault["id"] not in IGNORED and not IGNORED.keys() & set(fault.get("aliases", []))
    ]
    for line in faults:
        print(line)
    left_out = f"; LEFT OUT, because they are not known there: {', '.join(skipped)}" if skipped else ""
    print(f"pip-audit: {len(found) - len(skipped)} packages, {len(faults)} known faults{left_out}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
