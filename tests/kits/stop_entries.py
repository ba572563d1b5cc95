"""Entries for processes that are stopped by the tests of the process child."""

from __future__ import annotations

import signal
from pathlib import Path


def ignores_terminate(config: bytes) -> int:
    """Ignore SIGTERM, say so into the fifo named in the config, and stay."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say_ready(config)
    while True:
        signal.pause()


def ends_when_terminated(config: bytes) -> int:
    """Say so into the fifo named in the config, and stay until SIGTERM."""
    _say_ready(config)
    while True:
        signal.pause()


def _say_ready(config: bytes) -> None:
    with Path(config.decode()).open("wb") as fifo:
        fifo.write(b"ready")
