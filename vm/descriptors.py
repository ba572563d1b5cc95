"""How many descriptors a process that owns machines may have."""

from __future__ import annotations

import resource

WANTED = 65536
"""Enough for a machine with all its mounts, connections and forwards at their limits."""


def most_descriptors(wanted: int = WANTED) -> int:
    """``wanted``, or the hard limit of this process where that is less."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def raise_descriptor_limit(wanted: int = WANTED) -> int:
    """Raise the soft limit of this process to ``most_descriptors``; the limit in force. It is low
    by default for programs that use select(2), of which there is none here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = most_descriptors(wanted)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft
