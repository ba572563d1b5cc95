"""The bearer token of the API on TCP: where it comes from, and how it is compared."""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

FILE_VARIABLE = "VOIDBOX_DAEMON_TOKEN_FILE"
VARIABLE = "VOIDBOX_DAEMON_TOKEN"

_TOKEN_BYTES = 32
_FILE_LIMIT = 64 * 1024


class TokenError(Exception):
    """There is no usable token; the text says why and what to do."""


def server_token(given: Path | None, environ: Mapping[str, str]) -> str:
    """The token: of the file given, of the file or the text the environment names, else a new one
    in the file where clients look for it. Raises TokenError."""
    if given is not None:
        return read_token(given)
    named = environ.get(FILE_VARIABLE)
    if named:
        return read_token(Path(named))
    text = environ.get(VARIABLE, "")
    if text.strip():
        return text
    return make_token(default_token_path(environ))


def default_token_path(environ: Mapping[str, str]) -> Path:
    """Where clients look for a token nobody named."""
    config = environ.get("XDG_CONFIG_HOME")
    if config and Path(config).is_absolute():
        return Path(config) / "voidbox" / "daemon-token"
    home = environ.get("HOME")
    if home:
        return Path(home) / ".config" / "voidbox" / "daemon-token"
    return Path("/tmp") / f"voidbox-{os.getuid()}" / "daemon-token"  # noqa: S108 - where clients look


def read_token(path: Path) -> str:
    """The token in a file that only its owner may read. Raises TokenError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            text = os.read(fd, _FILE_LIMIT).decode().strip()
        finally:
            os.close(fd)
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"the token file {path} can't be read: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TokenError(
            f"the token file {path} can be used by others than its owner (mode "
            f"{stat.S_IMODE(mode):04o}); chmod 600 {path}"
        )
    if not text:
        raise TokenError(f"the token file {path} is empty; write a token to it")
    return text


def make_token(path: Path) -> str:
    """A new token, written to `path` in place of the one there was. Raises TokenError."""
    token = secrets.token_hex(_TOKEN_BYTES)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{token}\n".encode())
        finally:
            os.close(fd)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise TokenError(
            f"no token could be written to {path}: {error.strerror}; name a file with --token-file"
        ) from error
    return token


def authorized(header: str | None, token: str) -> bool:
    """Whether an `Authorization` header has the token. Takes the same time wherever they differ."""
    scheme, _, given = (header or "").partition(" ")
    if scheme != "Bearer":
        return False
    return hmac.compare_digest(_bytes_of(given), _bytes_of(token))


def _bytes_of(text: str) -> bytes:
    # aiohttp's headers and Python's environment write bytes that are no UTF-8 as lone surrogates.
    return text.strip().encode(errors="surrogateescape")
