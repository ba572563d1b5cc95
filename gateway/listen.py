"""Where the API listens: addresses, the place clients look for it, sockets and their rights."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOCKET_NAME = "voidbox"
"""Clients look for `$XDG_RUNTIME_DIR/voidbox.sock` and `voidbox-UID.sock` in other folders."""

_BACKLOG = 256


class ListenError(Exception):
    """The API can't listen there; the text says why and what to do."""


class AddressInUse(ListenError):
    """Somebody else serves that address."""


@dataclass(frozen=True)
class UnixAddress:
    """A socket in the file system."""

    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A literal IP and a port; 0 takes a free one."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """`unix:///PATH`, `tcp://IP:PORT` or `IP:PORT`. Raises ListenError."""
    if text.startswith("unix://"):
        path = text.removeprefix("unix://")
        if not path.startswith("/"):
            raise ListenError(f"{text!r}: after unix:// comes an absolute path")
        return UnixAddress(Path(path))
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError
    except ValueError:
        raise ListenError(
            f"{text!r} is no address; write unix:///PATH or tcp://IP:PORT, with a literal IP"
        ) from None
    return TcpAddress(host, number)


def default_address(environ: Mapping[str, str]) -> UnixAddress:
    """The first usable place in which clients look: a folder that exists and can be written."""
    uid = os.geteuid()
    places = (
        (environ.get("XDG_RUNTIME_DIR"), f"{SOCKET_NAME}.sock"),
        (environ.get("TMPDIR"), f"{SOCKET_NAME}-{uid}.sock"),
    )
    for folder, name in places:
        if folder and Path(folder).is_dir() and os.access(folder, os.W_OK):
            return UnixAddress(Path(folder) / name)
    return UnixAddress(Path("/tmp") / f"{SOCKET_NAME}-{uid}.sock")  # noqa: S108 - where clients look


def bind(address: Address) -> socket.socket:
    """A listening socket. Raises ListenError."""
    try:
        if isinstance(address, UnixAddress):
            return _bind_unix(address.path)
        return _bind_tcp(address)
    except OSError as error:
        kind = AddressInUse if error.errno == 98 else ListenError
        raise kind(
            f"the HTTP API can't listen on {address}: {error.strerror or error}; choose another "
            "address with --listen, or `--listen off`"
        ) from error


def unlink(address: Address) -> None:
    """Remove what a listening Unix socket leaves in the file system."""
    if isinstance(address, UnixAddress):
        with contextlib.suppress(OSError):
            address.path.unlink()


def _bind_tcp(address: TcpAddress) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind_unix(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Nobody connects before listen(), so the rights are in force for everyone.
        listener.bind(str(path))
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove a socket left by a process that has died; anything else in the way is refused."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise AddressInUse(
        f"another process serves {path}; stop it, or choose another address with --listen"
    )
