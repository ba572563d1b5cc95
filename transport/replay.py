"""Which numbers of a session were taken already: a message that comes a second time is not handled.

A session is one life of a leaf: its instance number, whatever connection it comes by. A leaf gives
each ask and tell a number, and the numbers leave in their order (`outbound.py`), so mostly the
next one is the highest yet. The window is RFC 4303's (section 3.4.3 and appendix A2): the highest
number, and a bit for each of the last ones. What is older than the window is taken for a replay.
"""

from __future__ import annotations

from collections import OrderedDict

# A peer that gives a number on one thread and sends on another is late by what the others sent
# meanwhile: 3900 at most, measured with 32 threads that did nothing else. A window is 512 bytes.
WINDOW = 4096

# Sessions without a link whose windows are kept: their leaves may come again. Half a megabyte.
ENDED_LIMIT = 1024

_MASK = (1 << WINDOW) - 1


class ReplayWindow:
    """The numbers one session has used."""

    __slots__ = ("_highest", "_seen")

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 0  # bit N: the highest number less N was taken

    def take(self, number: int) -> bool:
        """Use a number, 0 to 2**64 - 1. False where it was used before, or is older than all."""
        ahead = number - self._highest
        if ahead > 0:
            # Never a shift by what a peer has chosen.
            self._seen = ((self._seen << ahead) | 1) & _MASK if ahead < WINDOW else 1
            self._highest = number
            return True
        if ahead <= -WINDOW:
            return False
        bit = 1 << -ahead
        if self._seen & bit:
            return False
        self._seen |= bit
        return True


class EndedSessions:
    """The windows of sessions that have no link now; the oldest are forgotten."""

    def __init__(self, limit: int = ENDED_LIMIT) -> None:
        self._limit = limit
        self._windows: OrderedDict[tuple[str, int], ReplayWindow] = OrderedDict()

    def keep(self, node: str, instance: int, window: ReplayWindow) -> None:
        """Its link has ended."""
        self._windows[node, instance] = window
        self._windows.move_to_end((node, instance))
        if len(self._windows) > self._limit:
            self._windows.popitem(last=False)

    def resume(self, node: str, instance: int) -> ReplayWindow:
        """The window of a session that has a link now: the one it had before, or a new one."""
        return self._windows.pop((node, instance), None) or ReplayWindow()
