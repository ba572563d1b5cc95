"""An entry for processes that only wait to be killed."""

from __future__ import annotations

import signal


def run(_config: bytes) -> int:
    signal.pause()
    return 0
