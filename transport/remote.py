"""Endpoints for other machines: a hub's tcp addresses, its keys, and the keys of its clients.

A folder of keys holds the hub's pair (`server.key`, `server.key_secret`) and the public keys of
clients, `clients/observe/NAME.key` and `clients/operate/NAME.key`. It is read at each connection,
so a client's key that is removed opens no new one. A client is given one file with its own pair
and the hub's public key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from voidbus.transport.access import (
    AccessError,
    ClientKeys,
    Endpoints,
    ServerKeys,
    create_keys,
    load_keys,
    secure_directory,
)
from voidbus.transport.address import valid_node
from voidbus.transport.message import Right

_SERVER = "server"
# Z85 of 32 bytes (https://rfc.zeromq.org/spec/32/).
_KEY_LENGTH = 40
# A file of keys is some hundred bytes; more is something else.
_FILE_LIMIT = 8192

RIGHTS = (Right.OBSERVE, Right.OPERATE)
"""What other machines may be given. The work endpoint is for this host's run processes."""


def make_server_keys(folder: Path) -> bytes:
    """Make the hub's keys in `folder`, where it has none; its public key. Raises AccessError."""
    secure_directory(folder)
    secure_directory(folder / "clients")
    for right in RIGHTS:
        secure_directory(_clients(folder, right))
    if not _secret_file(folder).exists():
        create_keys(folder, _SERVER)
    return load_keys(_secret_file(folder))[0]


def make_client_keys(folder: Path, name: str, right: Right) -> ClientKeys:
    """Make keys for a client that may do what `right` allows, and let it in from now on.

    Raises AccessError where there is one of that name, or the name can't be a file's.
    """
    from zmq import curve_keypair

    if not valid_node(name):
        raise AccessError(f"client {name!r}: use letters, digits, '.', '_' and '-' for its name")
    server = make_server_keys(folder)
    public, secret = curve_keypair()
    # Who may operate may look; topics are an observer's.
    for each in RIGHTS:
        if right.allows(each):
            _write_new(_clients(folder, each) / f"{name}.key", _certificate(public), 0o600)
    return ClientKeys(public, secret, server)


def save_client_keys(path: Path, keys: ClientKeys) -> None:
    """Write a client's file, for its owner only. Raises AccessError where there is a file."""
    values = {"public": keys.public, "secret": keys.secret, "server": keys.server}
    text = json.dumps({name: value.decode() for name, value in values.items()}, indent=2)
    _write_new(path, text + "\n", 0o600)


def load_client_keys(path: Path) -> ClientKeys:
    """Read a client's file. Raises AccessError when it is not one, or readable by others."""
    try:
        if path.stat().st_mode & 0o077:
            raise AccessError(f"{path} is readable by others; run: chmod 600 {path}")
        with path.open("rb") as file:
            found = json.loads(file.read(_FILE_LIMIT))
        keys = [str(found[name]).encode() for name in ("public", "secret", "server")]
    except OSError as error:
        raise AccessError(f"cannot read client keys from {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError):
        keys = []
    if [len(key) for key in keys] != [_KEY_LENGTH] * 3:
        raise AccessError(f"{path} holds no client keys; make some with: voidbus keys client")
    return ClientKeys(*keys)


def remote_endpoints(folder: Path, rights: Mapping[Right, str], topics: str) -> Endpoints:
    """Where a hub listens for other machines. Raises AccessError where `folder` has no keys."""
    secret_file = _secret_file(folder)
    if not secret_file.exists():
        raise AccessError(
            f"there are no CURVE keys in {folder}, and without them nothing listens on tcp"
        )
    public, secret = load_keys(secret_file)
    clients = {right: secure_directory(_clients(folder, right)) for right in RIGHTS}
    return Endpoints(dict(rights), topics, ServerKeys(public, secret, clients))


class AllowedKeys:
    """Whether a client's key is in a folder, for the authenticator: looked up at each handshake."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def callback(self, _domain: str, key: bytes) -> bool:
        """Called by the authenticator's thread; `key` is in Z85."""
        from zmq import auth

        for path in self._folder.glob("*.key"):
            try:
                if auth.load_certificate(path)[0] == key:
                    return True
            except (OSError, ValueError):
                continue  # removed this moment, or no certificate
        return False


def _secret_file(folder: Path) -> Path:
    return folder / f"{_SERVER}.key_secret"


def _clients(folder: Path, right: Right) -> Path:
    return folder / "clients" / right.name.lower()


def _certificate(public: bytes) -> str:
    """A public key as a ZeroMQ certificate (https://rfc.zeromq.org/spec/4/)."""
    return f'metadata\ncurve\n    public-key = "{public.decode()}"\n'


def _write_new(path: Path, text: str, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w") as file:
            file.write(text)
    except FileExistsError:
        raise AccessError(f"{path} is there already; remove it, or use another name") from None
    except OSError as error:
        raise AccessError(f"cannot write {path}: {error.strerror}") from error
