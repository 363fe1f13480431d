"""Keys files: what they may say, and that a writer leaves either the old one or the new one."""

from __future__ import annotations

import hashlib
import stat
import threading
from pathlib import Path

import pytest

from router.keyring import (
    MAX_FILE_BYTES,
    Keyring,
    TenantRules,
    api_key,
    digest_of,
    dump_keyring,
    new_key,
    parse_keyring,
)
from router.keys_file import KeysFile
from router.watched_files import WatchedFiles
from tandem.errors import ConfigError, InvalidRequest

DIGEST = "0" * 64


def entry(**changes: str) -> str:
    values = {"name": "ci", "tenant": "acme", "role": "client", "sha256": f"'{DIGEST}'"} | changes
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


def test_a_keyring_is_read_as_it_was_written() -> None:
    key = new_key()
    keyring = (
        Keyring().with_key(api_key("ci", "acme", "client", key)).with_key(api_key("ops", "us", "admin", new_key()))
    )
    keyring = keyring.with_rules("acme", TenantRules(shared=True, requests_per_minute=60))
    written = dump_keyring(keyring)
    assert parse_keyring(written, "f") == keyring
    assert key.encode() not in written
    assert hashlib.sha256(key.encode()).hexdigest().encode() in written
    assert keyring.rules("acme").requests_per_minute == 60
    assert keyring.rules("us") == TenantRules()


def test_keys_are_of_256_random_bits() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {len("tdm_") + 43}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [", "not valid YAML"),
        ("\xff", "not valid YAML"),
        ("[]", ""),
        ("keys: 3", "Expected `array`"),
        ("key: []", "unknown field `key`"),
        (f"keys: [{entry(role='root')}]", "Invalid enum value 'root'"),
        (f"keys: [{entry(sha256='tdm_secret')}]", "matching regex"),
        (f"keys: [{entry(tenant=repr(''))}]", "matching regex"),
        (f"keys: [{entry(tenant=repr('a b'))}]", "matching regex"),
        (f"keys: [{entry(name='x' * 129)}]", "matching regex"),
        (f"keys: [{entry(key='tdm_secret')}]", "unknown field `key`"),
        (f"keys: [{entry()}, {entry(sha256=repr('1' * 64))}]", "two keys have the name 'ci'"),
        (f"keys: [{entry()}, {entry(name='other')}]", "two keys have the sha256"),
        ("tenants: {acme: {requests_per_minute: -1}}", ">= 0"),
        ("tenants: {acme: {rpm: 1}}", "unknown field `rpm`"),
        ("keys: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("#" * (MAX_FILE_BYTES + 1), f"more than {MAX_FILE_BYTES} bytes"),
        ("[" * 100_000, ""),
    ],
)
def test_what_is_no_keys_file_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="^keys.yaml") as caught:
        parse_keyring(text.encode("latin-1"), "keys.yaml")
    assert words in str(caught.value)


def test_a_name_is_given_once_and_what_is_not_there_is_not_removed() -> None:
    keyring = Keyring().with_key(api_key("ci", "acme", "client", "k"))
    with pytest.raises(InvalidRequest, match="named 'ci' already"):
        keyring.with_key(api_key("ci", "other", "client", "l"))
    with pytest.raises(InvalidRequest, match="no key named 'cd'; there are: ci"):
        keyring.without_key("cd")
    assert keyring.without_key("ci").keys == ()
    with pytest.raises(InvalidRequest, match="role"):
        api_key("ci", "acme", "root", "k")
    with pytest.raises(InvalidRequest, match="tenant"):
        keyring.with_rules("a b", TenantRules())


def test_the_file_is_its_owners_alone_and_all_who_write_at_once_are_in_it(tmp_path: Path) -> None:
    file = KeysFile(tmp_path / "new" / "keys.yaml")
    gate = threading.Barrier(8)

    def add(number: int) -> None:
        gate.wait(10)
        file.update(lambda keyring: keyring.with_key(api_key(f"key-{number}", "acme", "client", f"{number}")))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert {key.sha256 for key in file.read().keys} == {digest_of(f"{number}") for number in range(8)}
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [path.name for path in file.path.parent.iterdir()] == ["keys.yaml"]


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = KeysFile(tmp_path / "keys.yaml")
    file.update(lambda keyring: keyring.with_key(api_key("ci", "acme", "client", "k")))
    before = file.path.read_bytes()
    with pytest.raises(InvalidRequest):
        file.update(lambda keyring: keyring.without_key("other"))
    assert file.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_file_that_others_may_write_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = KeysFile(tmp_path / "keys.yaml")
    with pytest.raises(ConfigError, match="doesn't exist: make it with `tandem keys add`"):
        file.read()
    file.update(lambda keyring: keyring)
    for mode in (0o620, 0o602):
        file.path.chmod(mode)
        with pytest.raises(ConfigError, match="may be written by others"):
            file.read()
    file.path.chmod(0o444)
    assert file.read() == Keyring()


def test_a_change_is_seen_once_also_behind_a_link(tmp_path: Path) -> None:
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_text("1")
    new.write_text("2")
    link.symlink_to(old)
    watched = WatchedFiles([link])
    assert not watched.changed()
    link.unlink()
    link.symlink_to(new)
    assert watched.changed()
    assert not watched.changed()
    new.write_text("22")
    assert watched.changed()
    new.unlink()
    assert watched.changed()
    assert not watched.changed()
