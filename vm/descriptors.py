"""How many descriptors a process that owns machines may have."""

from __future__ import annotations

import resource

WANTED = 65536
"""Enough for a machine with all its mounts, connections and forwards at their limits."""


def raise_descriptor_limit(wanted: int = WANTED) -> int:
    """Raise the soft limit of this process to ``wanted``, or to the hard limit where that is less;
    the limit in force. It is low by default for programs that use select(2), of which there is none
    here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft
