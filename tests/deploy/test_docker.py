"""The Dockerfiles, as far as they can be judged where no container engine runs: what they copy is there, what they run exists."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from deploy.kubernetes import check

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
PATHS = {"/models", "/cache", "/cache/models", "/run/tandem", "/tmp", "/dev/shm", "/etc/tandem", "/etc/tandem-secret"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each with its text, lines joined and comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, text) for line in joined.splitlines() if line for name, _, text in (line.partition(" "),)]


def of(file: Path, wanted: str) -> list[str]:
    return [text for name, text in instructions(file) if name == wanted]


def is_sent(path: str) -> bool:
    """Whether `.dockerignore` lets it through; the last pattern that fits decides."""
    sent = True
    for pattern in IGNORED:
        plain = pattern.removeprefix("!")
        if fnmatch.fnmatch(path, plain) or path.startswith(f"{plain}/"):
            sent = pattern.startswith("!")
    return sent


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_base_has_a_tag_and_every_stage_a_base(file: Path) -> None:
    stages: set[str] = set()
    for text in of(file, "FROM"):
        base, _, stage = text.partition(" AS ")
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", base), base
        stages.add(stage)
    copied_from = {text.split()[0].removeprefix("--from=") for text in of(file, "COPY") if text.startswith("--from=")}
    assert copied_from <= stages


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_is_all_that_is_installed(file: Path) -> None:
    sources = {source for text in of(file, "COPY") if not text.startswith("--") for source in text.split()[:-1]}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not is_sent(source)] == []
    packages = {include.rstrip("*") for include in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"constraints.txt", "pyproject.toml", "setup.py", PROJECT["project"]["readme"]} == sources


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_versions_are_pinned_and_what_apt_fetched_is_gone(file: Path) -> None:
    runs = of(file, "RUN")
    assert [run for run in runs if "pip install" in run and "-c constraints.txt" not in run] == []
    assert [run for run in runs if "apt-get install" in run and "rm -rf /var/lib/apt/lists/*" not in run] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_modules_that_the_build_tries_exist(file: Path) -> None:
    text = "\n".join(of(file, "RUN"))
    setup = (ROOT / "setup.py").read_text()
    for module in re.findall(r"\b((?:kernels|kvpool|router)(?:\.\w+)+)", text):
        path = module.replace(".", "/")
        there = f'"{module}"' in setup or (ROOT / f"{path}.py").exists() or (ROOT / path / "__init__.py").exists()
        assert there, module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_user_is_the_one_that_the_manifests_name(file: Path) -> None:
    users = {
        template["spec"]["securityContext"]["runAsUser"]
        for overlay in check.EXPECTED
        for resource in check.render(overlay)
        if (template := check.pod_template(resource)) is not None
    }
    names = [name for name, _ in instructions(file)]
    assert [f"{user}:{user}" for user in users] == of(file, "USER")
    assert "RUN" not in names[names.index("USER") :]


@pytest.mark.parametrize("overlay", sorted(check.EXPECTED))
def test_manifests_run_what_the_images_have(overlay: str) -> None:
    scripts = set(PROJECT["project"]["scripts"]) | {"ray"}
    for resource in check.render(overlay):
        template = check.pod_template(resource)
        for container in check.containers(template) if template else ():
            first = container["command"][0]
            assert first in scripts | {"python", "timeout"}, first
            if first == "python" and container["command"][1] == "-m":
                assert (ROOT / container["command"][2] / "__main__.py").exists()
            image = container["image"].partition(":")[2].rpartition("-")[2]
            assert ROOT / "deploy" / "docker" / f"{image}.Dockerfile" in FILES
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {path for path in mounted if not path.startswith("/disk")} <= PATHS


def test_the_lint_reads_lines_that_go_on() -> None:
    runs = of(FILES[0], "RUN")
    assert all("\n" not in run for run in runs)
    assert shlex.split(runs[0])[:2] == ["apt-get", "update"]
