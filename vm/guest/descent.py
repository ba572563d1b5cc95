"""The way down to a path, one opened directory after the other.

Each is opened by itself, relative to the one before and without following links, so neither
``..`` nor a link, nor one put there meanwhile, leads out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def enter(parent: int, name: str) -> int:
    """Open a directory in an opened one. Raises OSError."""
    return os.open(name, DIRECTORY, dir_fd=parent)


@contextmanager
def descend(
    start: str,
    names: list[str],
    step: Callable[[int, str], int] = enter,
    visit: Callable[[int], object] = lambda _: None,
) -> Iterator[int]:
    """The opened directory that all the names lead to from ``start``. ``step`` opens the next
    one; each, the first and the last included, is shown to ``visit`` before the next is opened.
    Raises OSError."""
    # Where it starts is ours (see Place.start_of); from there on nothing is trusted.
    fd = os.open(start, DIRECTORY)
    try:
        visit(fd)
        for name in names:
            below = step(fd, name)
            os.close(fd)
            fd = below
            visit(fd)
        yield fd
    finally:
        os.close(fd)
