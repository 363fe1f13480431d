"""What the project promises about itself: its names are its own, its dependencies are explained, dangerous calls are absent."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OUR_NAMES = set(PROJECT["tool"]["importlinter"]["root_packages"])
SOURCES = sorted(path for name in OUR_NAMES for path in (ROOT / name).rglob("*.py"))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_dependencies() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return {normalized(name) for names in (PROJECT["project"]["dependencies"], *extras) for name in names}


def test_no_installed_distribution_claims_our_import_names() -> None:
    owners = importlib.metadata.packages_distributions()
    foreign = {name: set(owners.get(name, ())) - {"tandem"} for name in OUR_NAMES}
    assert not any(foreign.values()), foreign


def test_what_packages_need_beside_python_is_installed_with_them() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    listed = subprocess.run(
        ["git", "ls-files", *sorted(OUR_NAMES)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        path = Path(name)
        if path.suffix == ".py" or not (ROOT / path).exists():
            continue
        ours = [
            *patterns["*"],
            *(f"{package.replace('.', '/')}/{one}" for package, some in patterns.items() for one in some),
        ]
        assert any(path.match(pattern) for pattern in ours), f"{name} is in no package-data of pyproject.toml"
    assert (ROOT / "router/http/page/index.html").exists()


def test_every_top_level_package_is_declared() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == OUR_NAMES


def test_the_project_can_not_be_uploaded_to_an_index() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


def test_every_dependency_has_a_reason_and_a_pin() -> None:
    text = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    explained = {normalized(name) for name in re.findall(r"^\| ([\w-]+) \| \S", text, re.MULTILINE)} - {"package"}
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert explained == declared_dependencies()
    assert declared_dependencies() <= {normalized(name) for name in pins}


@pytest.mark.parametrize(
    "forbidden",
    [
        r"\bpickle\.loads?\(",
        r"\bimport pickle\b",
        r"\bmarshal\.loads?\(",
        r"\btorch\.load\(",
        r"(?<![\w.])eval\(",
        r"(?<![\w.])exec\(",
        r"\byaml\.(unsafe_)?load\(",
        r"\bshell=True",
        r"\btrust_remote_code\b",
    ],
)
def test_the_code_runs_nothing_that_data_could_choose(forbidden: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(forbidden, line)
    ]
    assert not found


def test_the_router_starts_without_torch_and_ray() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "router").rglob("*.py")
        if path.stem not in {"__init__", "__main__"}
    )
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}];"
        "print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_nothing_that_is_served_fetches_urls() -> None:
    """No module of the router, the workers and the pool can ask another host for what a client names."""
    fetches = re.compile(r"^\s*(?:import|from) (?:urllib\.request|requests|httpx|aiohttp|http\.client)\b", re.MULTILINE)
    folders = [
        "router",
        "prefill_worker",
        "decode_worker",
        "kvpool",
        "tandem/engine",
        "tandem/tokenizer",
        "tandem/models",
    ]
    served = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in served if fetches.search(path.read_text(encoding="utf-8"))] == []


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/security.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") if test else (ROOT / file).exists(), (
            file,
            test,
        )
