"""Listening Unix sockets that only their owner can reach."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

MAX_PATH = 107
"""Bytes of a Unix socket's path (sun_path, less its end; unix(7))."""


def check_path(path: Path, room: int = 0) -> None:
    """Raise ValueError unless the path, and ``room`` more bytes, fit a Unix socket's address."""
    length = len(os.fsencode(path)) + room
    if length > MAX_PATH:
        raise ValueError(
            f"the socket path {path} is too long ({length} bytes, at most {MAX_PATH}); "
            "use a shorter directory"
        )


def listen_unix(path: Path, backlog: int) -> socket.socket:
    """A non-blocking listening socket at ``path``, mode 0600. A socket left there by somebody
    else is replaced. Raises OSError, ValueError (path too long)."""
    check_path(path)
    if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file's mode comes from the socket's own (Linux), so it is never open to others.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
