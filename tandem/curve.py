"""Who may speak on the lines between the cluster's processes: CURVE keys, and the list of those that are let in.

Owns the files of a key folder and what is set on a ZeroMQ socket before it binds or connects; sends and answers nothing.

    NAME.secret    the secret key of one process, or of all of a role: `router`, `worker`, `pool`; mode 0600
    allowed        a line for each public key: role, key, and the one process it is for if it is not for all of the role

A process takes `NAME.secret` of its own name, else that of its role, so a machine needs the files of its own processes alone,
and the list. The list is read again when it changes, at most once a second.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import zmq
from zmq.utils import z85

from tandem.clock import now_s
from tandem.errors import ConfigError, ProtocolError

log = logging.getLogger(__name__)

KeyRole = Literal["router", "worker", "pool"]
Door = Literal["control", "fetch", "events", "replay"]
PublicKey: TypeAlias = str
"""Z85, `KEY_CHARS` long."""

DOORS: dict[Door, frozenset[KeyRole]] = {
    "control": frozenset({"worker", "pool"}),
    "fetch": frozenset({"worker", "pool"}),
    "events": frozenset({"router", "pool"}),
    "replay": frozenset({"router", "pool"}),
}
"""Who is let in at each kind of listening socket. Routers dial nobody's fetch socket, workers nobody's events."""

KEY_ROLES: dict[str, KeyRole] = {"router": "router", "prefill": "worker", "decode": "worker", "pool": "pool"}
"""Which keys are a process's, by its role. The two kinds of worker have the same: one may become the other."""

KEY_CHARS = 40
MAX_LIST_BYTES = 1 << 20
ALLOWED = "allowed"
HANDSHAKE_MS = 10_000
"""A connection that has not proved itself by then is closed."""
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Member:
    """What a public key stands for: any process of the role, or the one of that name."""

    role: KeyRole
    name: str = ""


class AllowList:
    """The public keys that are let in. Raises ConfigError for a file that is none; one that becomes bad later is left
    unread, and the one before it holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_s = now_s()
        self._seen = self._stamp()
        self._take(_parsed(path))

    def member(self, key: PublicKey) -> Member | None:
        """Who has this key; None for a stranger."""
        self._look()
        return self._members.get(key)

    def speaker(self, key: PublicKey, process: str) -> Member | None:
        """As `member`, if it may speak as `process`: a key that is for one process speaks as no other, and a process that has a
        key of its own speaks with no other."""
        found = self.member(key)
        if found is None or (found.name or process) != process or (process in self._named and not found.name):
            return None
        return found

    @property
    def router_key(self) -> PublicKey:
        """The key that all routers share."""
        self._look()
        return self._router_key

    def _look(self) -> None:
        if now_s() < self._looked_s + _LOOK_AGAIN_S:
            return
        self._looked_s = now_s()
        if (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        try:
            self._take(_parsed(self._path))
        except ConfigError as error:
            log.error("%s; the list before it holds", error)
        else:
            log.info("%s has changed: %d keys are let in", self._path, len(self._members))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _take(self, members: dict[PublicKey, Member]) -> None:
        self._members = members
        self._named = frozenset(member.name for member in members.values() if member.name)
        self._router_key = next(key for key, member in members.items() if member.role == "router")


class Keyring:
    """A process's own key pair and whom it trusts. One thread uses it."""

    def __init__(self, secret: str, allowed: AllowList) -> None:
        self._secret = secret.encode()
        self._public = zmq.curve_public(self._secret)
        self.public_key: PublicKey = self._public.decode()
        self.allowed = allowed

    def guard(self, socket: zmq.Socket[bytes], door: Door) -> None:
        """Has a socket let in only whom the list names for this door; before it binds. Nobody comes in while no `Zap` of the
        socket's context answers."""
        socket.curve_server = 1
        socket.curve_secretkey = self._secret
        socket.setsockopt_string(zmq.ZAP_DOMAIN, door)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it libzmq lets everybody in when nobody answers
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)

    def dial_router(self, socket: zmq.Socket[bytes]) -> None:
        """Has a socket speak with routers alone; before it connects."""
        self._dial(socket, self.allowed.router_key)

    def dial(self, socket: zmq.Socket[bytes], process: str, key: PublicKey) -> None:
        """Has a socket speak with `process` alone, which is said to have `key`; before it connects. Raises ProtocolError if
        that key is not one that serves blocks under this name."""
        found = self.allowed.speaker(key, process)
        if found is None or found.role == "router":
            raise ProtocolError(f"{process} has the key {key!r}, which the list of those let in doesn't give it")
        self._dial(socket, key)

    def _dial(self, socket: zmq.Socket[bytes], key: PublicKey) -> None:
        socket.curve_serverkey = key.encode()
        socket.curve_publickey = self._public
        socket.curve_secretkey = self._secret


def load_keyring(folder: str, name: str, role: str) -> Keyring | None:
    """The keys of the process `name` of a role; None if `folder` is empty: lines are plain then. Raises ConfigError."""
    if not folder:
        return None
    base = Path(folder).expanduser()
    own, shared = base / f"{name}.secret", base / f"{KEY_ROLES[role]}.secret"
    secret = _read_secret(own if own.exists() else shared)
    keys = Keyring(secret, AllowList(base / ALLOWED))
    found = keys.allowed.speaker(keys.public_key, name)
    if found is None or found.role != KEY_ROLES[role]:
        raise ConfigError(
            f"control.curve: {base / ALLOWED} doesn't name the key of {name} ({keys.public_key}) as a {KEY_ROLES[role]}'s"
        )
    return keys


def make_keys(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Makes what a cluster needs in `folder`: the routers' key, one for all workers and one for all pool nodes, or, if there are
    `names`, one for each of those processes; and adds them to the list. Returns the files of the secret keys. Raises ConfigError
    if one of them is there already, or a name is not of a worker or pool node."""
    wanted: list[tuple[str, Member]] = []
    if not names or not (folder / "router.secret").exists():
        wanted.append(("router", Member("router")))
    if not names:
        wanted += [("worker", Member("worker")), ("pool", Member("pool"))]
    for name in names:
        role = KEY_ROLES.get(name.partition("-")[0])
        if role is None or role == "router" or len(name.split()) != 1 or "/" in name:
            raise ConfigError(f"{name!r} is no process that has a key of its own: prefill-…, decode-… and pool-… are")
        wanted.append((name, Member(role, name)))
    made: list[Path] = []
    lines: list[str] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, member in wanted:
            public, secret = zmq.curve_keypair()
            file = folder / f"{name}.secret"
            _write_new(file, secret + b"\n")
            made.append(file)
            lines.append(" ".join([member.role, public.decode(), member.name]).rstrip())
        before = (folder / ALLOWED).read_text(encoding="ascii") if (folder / ALLOWED).exists() else ""
        new = folder / f".{ALLOWED}.new"
        new.unlink(missing_ok=True)
        _write_new(new, (before + "".join(line + "\n" for line in lines)).encode())
        new.rename(folder / ALLOWED)  # who reads it meanwhile finds a whole one
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} is there already: remove it, or name another folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}: keys can't be written: {error}") from error
    return made


def _write_new(file: Path, data: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(data)


def _read(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"control.curve: {path} can't be read: {error.strerror}") from error
    if len(data) > limit:
        raise ConfigError(f"control.curve: {path} has more than {limit} bytes")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise ConfigError(f"control.curve: {path} is not ASCII: {error}") from error


def _read_secret(path: Path) -> str:
    text = _read(path, 256).strip()
    try:
        mode = path.stat().st_mode
        zmq.curve_public(text.encode())
    except OSError as error:
        raise ConfigError(f"control.curve: {path} can't be read: {error.strerror}") from error
    except (zmq.ZMQError, ValueError) as error:
        raise ConfigError(f"control.curve: {path} holds no secret key: `tandem curve make` makes some") from error
    if mode & 0o027:
        raise ConfigError(
            f"control.curve: {path} has mode {mode & 0o777:04o}: others may read it, or its group write it"
        )
    return text


def _parsed(path: Path) -> dict[PublicKey, Member]:
    members: dict[PublicKey, Member] = {}
    for number, line in enumerate(_read(path, MAX_LIST_BYTES).splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        where = f"control.curve: {path}: line {number}"
        role = next((role for role in get_args(KeyRole) if role == words[0]), None)
        if role is None or not 2 <= len(words) <= 3:
            raise ConfigError(
                f"{where} is {line[:80]!r}, must be `router`, `worker` or `pool`, a public key, and a name or none"
            )
        if not _is_key(words[1]):
            raise ConfigError(f"{where}: {words[1][:80]!r} is no public key: {KEY_CHARS} characters of Z85")
        if words[1] in members:
            raise ConfigError(f"{where}: the key {words[1]} stands there twice")
        members[words[1]] = Member(role, words[2] if len(words) == 3 else "")
    num_routers = sum(member.role == "router" for member in members.values())
    if num_routers != 1:
        raise ConfigError(
            f"control.curve: {path} names {num_routers} keys of routers, must be the one that all of them share"
        )
    return members


def _is_key(text: str) -> bool:
    try:
        return len(text) == KEY_CHARS and len(z85.decode(text.encode())) == 32
    except (ValueError, KeyError, struct.error):  # struct.error: five characters for more than 32 bits
        return False
