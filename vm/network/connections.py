"""What a guest has open to the outside: TCP connections and, in one table each, other flows."""

from __future__ import annotations

import collections
import enum

from voidbus.vm.network.packets import FIN, RST

IDLE_SECONDS = 7200.0
"""A TCP connection silent for so long makes room for a new one; passt's own time for it."""

HALF_CLOSED_SECONDS = 60.0
"""The same once the guest has closed its side: Linux's tcp_fin_timeout (tcp(7)), after which the
guest knows nothing of it."""

CLOSING = 256
"""Connections closed by both sides whose last acknowledgements still pass."""


class Admission(enum.Enum):
    """What becomes of a new connection."""

    OPENED = enum.auto()
    DELAYED = enum.auto()
    """Too many this second. The guest's kernel asks again in a second."""
    FULL = enum.auto()


class Connection:
    """A TCP connection: when the guest last sent something on it, by how many bits its windows
    are scaled, and which sides have ended."""

    __slots__ = ("guest_ended", "host_ended", "last", "scale")

    def __init__(self, now: float, scale: int) -> None:
        self.last = now
        self.scale = scale
        self.guest_ended = False
        self.host_ended = False


class Connections:
    """The guest's TCP connections, at most ``limit``, ``per_second`` new ones a second. A key is
    both addresses and both ports, as the guest's packets have them. Times are seconds of one
    monotonic clock."""

    def __init__(self, limit: int, per_second: int) -> None:
        self._limit = limit
        self._per_second = per_second
        self._tokens = float(per_second)
        self._filled = 0.0
        self._open: dict[bytes, Connection] = {}
        self._closing: collections.OrderedDict[bytes, Connection] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def find(self, key: bytes) -> Connection | None:
        """The connection, also one that is closing."""
        return self._open.get(key) or self._closing.get(key)

    def is_open(self, key: bytes) -> bool:
        """Whether the connection counts: neither reset nor closed by both sides."""
        return key in self._open

    def admit(self, key: bytes, now: float, scale: int) -> tuple[Admission, bytes | None]:
        """Open a connection, or say why not. With it the key of a forgotten connection whose
        place it took, if there was one."""
        evicted = None
        if len(self._open) >= self._limit:
            evicted = self._forgotten(now)
            if evicted is None:
                return Admission.FULL, None
        if not self._take_token(now):
            return Admission.DELAYED, None
        if evicted is not None:
            del self._open[evicted]
        self._closing.pop(key, None)
        self._open[key] = Connection(now, scale)
        return Admission.OPENED, evicted

    def guest_flags(self, key: bytes, flags: int) -> None:
        """The guest sent a segment with FIN or RST."""
        self._ended(key, flags, by_guest=True)

    def host_flags(self, key: bytes, flags: int) -> None:
        """The other side did."""
        self._ended(key, flags, by_guest=False)

    def _ended(self, key: bytes, flags: int, *, by_guest: bool) -> None:
        connection = self._open.get(key)
        if connection is None:
            if flags & RST:
                self._closing.pop(key, None)
            return
        if flags & RST:
            del self._open[key]
            return
        if flags & FIN and by_guest:
            connection.guest_ended = True
        elif flags & FIN:
            connection.host_ended = True
        if connection.guest_ended and connection.host_ended:
            self._closing[key] = self._open.pop(key)
            if len(self._closing) > CLOSING:
                self._closing.popitem(last=False)

    def _forgotten(self, now: float) -> bytes | None:
        for key, connection in self._open.items():
            allowed = HALF_CLOSED_SECONDS if connection.guest_ended else IDLE_SECONDS
            if now - connection.last >= allowed:
                return key
        return None

    def _take_token(self, now: float) -> bool:
        gained = (now - self._filled) * self._per_second
        self._tokens = min(float(self._per_second), self._tokens + gained)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Flows:
    """Flows without an end of their own: each is forgotten ``seconds`` after its last use, as
    passt forgets it, and at most ``limit`` are known at a time."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._used: collections.OrderedDict[bytes, float] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def use(self, key: bytes, now: float) -> bool:
        """Whether a packet of this flow may pass."""
        if key not in self._used and len(self._used) >= self._limit:
            oldest, used = next(iter(self._used.items()))
            if now - used < self._seconds:
                return False
            del self._used[oldest]
        self._used[key] = now
        self._used.move_to_end(key)
        return True
