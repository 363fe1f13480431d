"""`make check` asks for known faults: one fails it, and a check that could not be made says so and fails nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
SOUND = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found"}
FAULTY = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"], "aliases": []}]}


def run(tmp_path: Path, says: str, code: int = 0) -> tuple[int, str]:
    """What comes of it when pip-audit prints that."""
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\necho trouble at last >&2\nexit {code}\n")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=os.environ | {"PIP_AUDIT": str(program)}, capture_output=True, text=True
    )
    return done.returncode, done.stdout


def answer(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies})


def test_a_known_fault_fails(tmp_path: Path) -> None:
    code, text = run(tmp_path, answer(SOUND, FAULTY), 1)
    assert code == 1
    assert "c 2: CVE-1, mended in 3" in text


def test_without_one_all_is_well_and_what_is_not_known_is_named(tmp_path: Path) -> None:
    code, text = run(tmp_path, answer(SOUND, UNKNOWN))
    assert code == 0
    assert "1 packages, 0 known faults" in text
    assert "LEFT OUT, because they are not known there: b" in text


@pytest.mark.parametrize("says", ["", "no JSON", "{}", '{"dependencies": 7}', answer(UNKNOWN, UNKNOWN)])
def test_a_check_that_was_not_made_says_so(tmp_path: Path, says: str) -> None:
    code, text = run(tmp_path, says, 1)
    assert code == 0
    assert text.startswith("pip-audit: LEFT OUT")
