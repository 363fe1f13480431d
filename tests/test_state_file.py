"""The state file of a process: what is seen of it in the run folder, and what a faulty folder costs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tandem.state_file import StateFile


def test_it_says_what_it_was_last_told_and_is_gone_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "run" / "decode-0.state"
    with StateFile(tmp_path / "run", "decode-0") as state:
        assert not file.exists()
        state.show("alone", 1.0)
        assert file.read_text() == "alone\n"
        state.show("joined", 1.1)
        assert file.read_text() == "joined\n"
    assert not file.exists()


def test_its_time_of_change_follows_the_loop_a_second_apart(tmp_path: Path) -> None:
    file = tmp_path / "decode-0.state"
    state = StateFile(tmp_path, "decode-0")
    state.show("joined", 1.0)
    os.utime(file, (0, 0))
    state.show("joined", 1.5)
    assert file.stat().st_mtime == 0.0
    state.show("joined", 2.0)
    assert file.stat().st_mtime > 0.0


def test_what_a_killed_predecessor_left_behind_says_nothing_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "decode-0.state").write_text("joined\n")
    StateFile(tmp_path, "decode-0")
    assert not (tmp_path / "decode-0.state").exists()


def test_a_name_is_no_path(tmp_path: Path) -> None:
    StateFile(tmp_path / "run", "../x").show("joined", 1.0)
    assert [path.name for path in tmp_path.rglob("*.state")] == [".._x.state"]


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file")
    with caplog.at_level(logging.WARNING), StateFile(tmp_path / "run", "decode-0") as state:
        state.show("joined", 1.0)
        state.show("joined", 5.0)
    assert len(caplog.records) == 1
