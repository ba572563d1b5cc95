"""The messages two nodes exchange about their link itself."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from pydantic import Field

from voidbus.transport.message import Message


class Hello(Message, tag="link.hello"):
    """A leaf presents itself. `token` proves, on the work endpoint, that it is the node it says.
    `packs`: it reads packed messages (`packing.py`)."""

    node: str
    instance: int
    generation: int = 0
    token: str = Field(default="", repr=False)
    pid: int = 0
    start_time: int = 0
    packs: bool = False


class Welcome(Message, tag="link.welcome"):
    """The hub takes the link. `now` is bus time; `boot` says whose monotonic clock it is.

    `topics_port` is where, on the same host, a link by tcp finds the topics; 0: nowhere. `packs`:
    the hub reads packed messages.
    """

    hub: str
    instance: int
    now: float
    boot: str
    topics_port: int = 0
    packs: bool = False


class Refused(Message, tag="link.refused"):
    """The hub does not take the link, for good; a refused run process ends itself."""

    detail: str


class Subscribed(Message, tag="link.subscribed"):
    """A mark: `Kind.MARK` on a topic says what its last number was when a subscriber joined."""


@cache
def boot_identity() -> str:
    """What tells this boot of this machine from any other (proc(5), random/boot_id)."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
