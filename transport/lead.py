"""Who drives a node's sockets: its own thread, or for a while one that waits for what they bring.

An ask that passes through the node's thread at both ends changes threads four times more than a
bare socket's, 25 us each. So when that thread has handed over an ask, or the reply to one, it
stands aside for a moment. Whoever it woke most likely waits again at once: the asker for its next
reply, the actor for its next message. That one then takes the lead and drives the sockets until it
has that, and what it sends and what comes for it change threads no more ("leader and followers",
Pattern-Oriented Software Architecture, volume 2). When nobody leads for a moment, the node's thread
does again. Whoever has the lead may use the sockets, and nobody else.
"""

from __future__ import annotations

import threading

# How long the node's thread lets nobody lead (seconds). What comes or is sent while the one that
# was woken is busy waits so much longer, twice that at most.
_MOMENT = 0.001
# When another thread has led for so many moments on end, it waits for something rare. Then the
# node's thread sleeps until that one leaves, rather than wake each moment.
_MOMENTS_AWAKE = 4
# Asleep, it looks this often whether anybody still leads, though whoever leaves recalls it. It is
# rare, since in a process that is idle otherwise each look wakes it for nothing.
_LOOK_SECONDS = 60.0


class Lead:
    """The right to use the sockets. The node's thread has it from the first."""

    def __init__(self) -> None:
        self._held = threading.Lock()
        self._held.acquire()
        self._changes = 0
        self._recall = threading.Lock()
        self._recall.acquire()
        self._guard = threading.Lock()
        self._stands_by = False
        self._sleeps = False

    # -- for threads that wait -------------------------------------------------------------

    def take(self) -> bool:
        """Take the lead, where nobody has it."""
        if not self._held.acquire(False):
            return False
        self._changes += 1
        return True

    def leave(self) -> None:
        """Give up the lead."""
        self._changes += 1
        self._held.release()
        if self._sleeps:  # looked at last: the node's thread sleeps only where somebody leads
            self.recall()

    def recall(self) -> None:
        """Let the node's thread lead as soon as it can, where it stands by. Any thread."""
        with self._guard:
            if self._stands_by:
                self._stands_by = False
                self._recall.release()

    # -- for the node's thread -------------------------------------------------------------

    def stand_by(self) -> None:
        """Leave the lead to others, until they don't want it."""
        self._stands_by = True
        self._held.release()
        recalled = self._await_recall()
        with self._guard:
            if not recalled and not self._stands_by:  # it was recalled in this very moment
                self._recall.acquire()
            self._stands_by = False
        self._held.acquire()

    def _await_recall(self) -> bool:
        """Wait until nobody leads. True where it was recalled."""
        unchanged = 0
        while unchanged < _MOMENTS_AWAKE:
            before = self._changes
            if self._recall.acquire(timeout=_MOMENT):
                return True
            if before != self._changes:
                unchanged = 0
            elif not self._held.locked():
                return False
            else:
                unchanged += 1
        self._sleeps = True
        try:
            # Whoever leads sees from here on that it must recall us.
            while self._held.locked():
                if self._recall.acquire(timeout=_LOOK_SECONDS):
                    return True
            return False
        finally:
            self._sleeps = False
