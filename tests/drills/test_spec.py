"""Drills as files: those that are there, and what is refused with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.drills import spec
from tandem.drills.processes import REPOSITORY
from tandem.errors import ConfigError

GOOD = """
about: A test.
cluster: some
requests: [{name: q}]
steps: [{do: signal, process: decode-0, when: {tokens: {q: 3}}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clusters").mkdir()
    lines = "lines: {control: {process: decode-0}, data: {process: decode-0, kind: data}}"
    (tmp_path / "clusters" / "some.yaml").write_text(f"processes: [router, decode-0]\n{lines}\n")
    return tmp_path


@pytest.mark.parametrize("name", spec.names())
def test_every_drill_can_be_read_and_says_what_it_shows(name: str) -> None:
    drill = spec.load(name)
    assert drill.spec.about.endswith(".")
    assert drill.spec.promise
    for step in drill.spec.steps:
        if isinstance(step, spec.SignalStep | spec.StartStep) and step.process[:4] not in ("busy", "last"):
            assert step.process in drill.cluster.processes


def test_there_are_thirty_drills_at_least() -> None:
    assert len(spec.names()) >= 30


def test_what_is_not_said_has_its_default(folder: Path) -> None:
    (folder / "one.yaml").write_text(GOOD)
    drill = spec.load("one", folder)
    (step,) = drill.spec.steps
    assert isinstance(step, spec.SignalStep)
    assert (step.signal, step.when.within_s, drill.cluster.layers) == ("KILL", 30.0, 4)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("do: signal", "do: hope"), "Invalid value 'hope' - at `$.steps[0].do`"),
        (("process: decode-0", "procss: decode-0"), "unknown field `procss` - at `$.steps[0]`"),
        (("tokens: {q: 3}", "tokens: {q: many}"), "Expected `int`, got `str` - at `$.steps[0].when.tokens[...]`"),
        (("tokens: {q: 3}", "tokens: {p: 3}"), "steps[0].when: there are no requests 'p'"),
        (("name: q", "name: q, count: 0"), "Expected `int` >= 1 - at `$.requests[0].count`"),
        (("name: q", "name: q, phase: 2"), "requests[0].phase: no step sends phase 2"),
        (("name: q", "name: q, again: r"), "requests[0].again: there are no requests 'r'"),
        (("do: signal, process: decode-0", "do: load, phase: 3"), "steps[0].phase: no request has phase 3"),
        (("do: signal, process: decode-0", "do: line, line: x, state: cut"), "cluster 'some' has no line 'x'"),
        (("do: signal, process: decode-0", "do: events, line: control"), "carries no KV events"),
        (("do: signal, process: decode-0", "do: disk, how: fill"), "small_disk_bytes is 0"),
        (("[{name: q}]", "[{name: q}, {name: q}]"), "requests: two have one name"),
        (("about:", "expect: {errors: {x.internal: 1}}\nabout:"), "expect: there are no requests 'x'"),
        (("about: A test.", "about: ["), "not valid YAML"),
    ],
)
def test_what_is_wrong_is_refused_with_file_and_key(folder: Path, change: tuple[str, str], found: str) -> None:
    (folder / "one.yaml").write_text(GOOD.replace(*change))
    with pytest.raises(ConfigError) as caught:
        spec.load("one", folder)
    assert str(caught.value).startswith(str(folder / "one.yaml"))
    assert found in str(caught.value)


def test_an_unknown_drill_is_named_with_those_that_there_are(folder: Path) -> None:
    (folder / "one.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match="there is no drill 'two'; there are one"):
        spec.load("two", folder)


def test_each_drill_is_in_the_table_of_promises() -> None:
    told = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [name for name in spec.names() if f"`{name}`" not in told] == []
