"""Who may connect: endpoints for each right in a directory only the owner can enter, and CURVE.

A right is a socket. ipc endpoints are protected by their directory; tcp endpoints exist only with
CURVE keys (https://rfc.zeromq.org/spec/26/), each right with its own list of client keys.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from voidbus.transport.message import Right

# sun_path holds 108 bytes with its terminating NUL (unix(7)).
_SUN_PATH = 107
_LONGEST_SOCKET = len("/operate.sock")


class AccessError(Exception):
    """An endpoint that can't be used safely; the text says what to do."""


@dataclass(frozen=True)
class ServerKeys:
    """The hub's CURVE key pair and the folders of client public keys, one for each right."""

    public: bytes
    secret: bytes = field(repr=False)
    clients: dict[Right, Path]


@dataclass(frozen=True)
class ClientKeys:
    """A leaf's CURVE key pair and the hub's public key."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


@dataclass(frozen=True)
class Endpoints:
    """Where a hub listens: one URL for each right, and the topics, if any.

    `keys` come with tcp only.
    """

    rights: dict[Right, str]
    topics: str
    keys: ServerKeys | None = None

    def __post_init__(self) -> None:
        for url in filter(None, (*self.rights.values(), self.topics)):
            require_safe(url, has_keys=self.keys is not None)


def require_safe(url: str, *, has_keys: bool) -> None:
    """Raises AccessError for a transport we don't speak, and for tcp without CURVE keys."""
    scheme = url.partition("://")[0]
    if scheme not in {"inproc", "ipc", "tcp"}:
        raise AccessError(f"endpoint {url!r}: use inproc://, ipc:// or tcp://")
    if scheme == "tcp" and not has_keys:
        raise AccessError(f"endpoint {url!r}: tcp is refused without CURVE keys")


def ipc_endpoints(directory: Path) -> Endpoints:
    """The ipc endpoints in `directory`, which `secure_directory` must have made."""
    return Endpoints(
        rights={right: f"ipc://{directory}/{right.name.lower()}.sock" for right in Right},
        topics=f"ipc://{directory}/topics.sock",
    )


def inproc_endpoints(name: str) -> Endpoints:
    """Endpoints inside one process and one ZeroMQ context."""
    return Endpoints(
        rights={right: f"inproc://{name}-{right.name.lower()}" for right in Right},
        topics=f"inproc://{name}-topics",
    )


def socket_directory(state_dir: Path) -> Path:
    """The directory for a state directory's sockets: the same one whoever asks.

    It is `<state>/bus`, or a short path under /tmp named after the state directory where that
    would be longer than a Unix socket's address may be. It does not depend on the environment:
    run processes and a restarted supervisor must find each other again.
    """
    inside = state_dir / "bus"
    if len(os.fsencode(inside)) + _LONGEST_SOCKET <= _SUN_PATH:
        return inside
    digest = hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:16]
    return Path(f"/tmp/voidbus-{os.geteuid()}-{digest}")  # noqa: S108 - checked by secure_directory


def secure_directory(path: Path) -> Path:
    """Make `path` a directory only this user can enter, or raise AccessError saying why not."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise AccessError(f"{path} is not a directory; remove it")
        if status.st_uid != os.geteuid():
            raise AccessError(f"{path} belongs to user {status.st_uid}, not to you; remove it")
        if status.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise AccessError(f"cannot make {path}: {error.strerror}") from error
    return path


def create_keys(directory: Path, name: str) -> tuple[bytes, bytes]:
    """Make a CURVE key pair: `name.key`, `name.key_secret` (0600). Returns (public, secret)."""
    from zmq import auth  # brings asyncio and ssl, which a client of an ipc hub has no use for

    secure_directory(directory)
    old = os.umask(0o077)
    try:
        public_file, secret_file = auth.create_certificates(str(directory), name)
    finally:
        os.umask(old)
    public, _ = auth.load_certificate(public_file)
    _, secret = auth.load_certificate(secret_file)
    if secret is None:
        raise AccessError(f"{secret_file} holds no secret key")
    return public, secret


def load_keys(secret_file: Path) -> tuple[bytes, bytes]:
    """Read a key pair. Raises AccessError when it is unreadable or readable by others."""
    from zmq import auth

    try:
        if secret_file.stat().st_mode & 0o077:
            raise AccessError(f"{secret_file} is readable by others; run: chmod 600 {secret_file}")
        public, secret = auth.load_certificate(str(secret_file))
    except (OSError, ValueError) as error:
        raise AccessError(f"cannot read CURVE keys from {secret_file}: {error}") from error
    if secret is None:
        raise AccessError(f"{secret_file} holds no secret key")
    return public, secret
