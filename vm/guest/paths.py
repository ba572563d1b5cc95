"""Guest paths the host may name in its file requests."""

from __future__ import annotations

import errno

ROOTS = ("/workspace", "/home", "/etc/voidbox")
"""Where files may be read and written (protocol, "File RPCs")."""


def names_of(path: str) -> list[str]:
    """The names on the way to a path, from the root. Raises ValueError for a path that is not
    absolute, goes upwards, or is outside the roots."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    inside = any(
        names[: len(root)] == root and len(names) >= len(root)
        for root in ([part for part in text.split("/") if part] for text in ROOTS)
    )
    if not path.startswith("/") or ".." in names or not inside:
        raise ValueError(f"{path!r} is outside {', '.join(ROOTS)}")
    return names


def reason(error: Exception, path: str) -> str:
    """Why a request for a path failed, in words for the host."""
    if isinstance(error, OSError):
        if error.errno == errno.ELOOP:
            return f"{path}: links are not followed"
        return f"{path}: {error.strerror}"
    return str(error)
