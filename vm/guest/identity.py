"""The user programs run as."""

from __future__ import annotations

from typing import NamedTuple


class Identity(NamedTuple):
    """A user and its group, by number."""

    uid: int
    gid: int


SANDBOX = Identity(1000, 1000)
"""The user of every guest (protocol, "Exec")."""
