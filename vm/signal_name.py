"""What a signal is called."""

from __future__ import annotations

import signal


def signal_name(number: int) -> str:
    """The name of a signal, "signal 40" for one that has none. A process may end by any of them,
    real-time signals (signal(7)) too, and ``signal.Signals`` knows only the first and last."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
