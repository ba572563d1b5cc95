"""Memory that malloc keeps for later, given back to the system."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Give back what nobody uses (malloc_trim(3), of glibc). A thread that did much and has ended
    leaves what it used to its arena, for threads that may never come."""
    if _trim is not None:
        _trim(0)
