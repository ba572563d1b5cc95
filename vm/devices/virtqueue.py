"""Split virtqueues, the device's side (virtio 1.2, section 2.7)."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from voidbus.vm.devices.faults import GuestMemoryError, QueueError
from voidbus.vm.devices.memory import GuestMemory

MAX_QUEUE_SIZE = 32768
"""The largest split virtqueue (virtio 1.2, 2.7)."""

# Descriptor flags (2.7.5), ring flags (2.7.6, 2.7.8).
DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4
AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_WRAP = 0xFFFF


class Chain:
    """One request of the driver: what it wants read, then what it wants written.

    The memoryviews lie in guest memory, which the driver may change at any moment: copy what is
    to be checked. Their owner drops them with the chain, once it is pushed.
    """

    __slots__ = ("head", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(self, head: int) -> None:
        self.head = head
        """The number of its first descriptor."""
        self.readable: list[memoryview] = []
        """What the device may read, in order."""
        self.writable: list[memoryview] = []
        """What the device may write, in order."""
        self.readable_bytes = 0
        self.writable_bytes = 0

    def read(self, size: int = -1, offset: int = 0) -> bytes:
        """A copy of at most ``size`` readable bytes from ``offset`` on; all with -1."""
        return b"".join(_part(self.readable, offset, size))

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Put ``data`` into the writable bytes from ``offset`` on. Returns how many had room."""
        source = memoryview(data)
        done = 0
        for piece in _part(self.writable, offset, len(source)):
            piece[:] = source[done : done + len(piece)]
            done += len(piece)
        return done

    def readable_from(self, offset: int, size: int = -1) -> list[memoryview]:
        """Views of at most ``size`` readable bytes from ``offset`` on, for ``pwritev``."""
        return _part(self.readable, offset, size)

    def writable_from(self, offset: int, size: int = -1) -> list[memoryview]:
        """Views of at most ``size`` writable bytes from ``offset`` on, for ``preadv``."""
        return _part(self.writable, offset, size)


def _part(pieces: list[memoryview], offset: int, size: int) -> list[memoryview]:
    # What follows a header that has a descriptor of its own: Linux lays most requests out so.
    if len(pieces) == 2 and offset == len(pieces[0]) and 0 <= size <= len(pieces[1]):
        return [pieces[1][:size]] if size else []
    part = []
    for piece in pieces:
        if size == 0:
            break
        length = len(piece)
        if offset >= length:
            offset -= length
            continue
        if offset or 0 <= size < length:
            piece = piece[offset:] if size < 0 else piece[offset : offset + size]
            offset = 0
        part.append(piece)
        if size > 0:
            size -= len(piece)
    return part


@dataclass(frozen=True)
class RingAddresses:
    """Guest physical addresses of a queue's three areas (virtio 1.2, 2.7)."""

    descriptors: int
    available: int
    used: int


class Virtqueue:
    """One queue while it runs. It belongs to the event loop's thread.

    ``pop`` takes the driver's next chain, ``push`` gives it back, ``notify`` interrupts the
    driver if it wants that. A device that has taken everything calls ``enable_notifications``
    to be kicked again. A queue at most ``size`` long never holds more than ``size`` chains, and
    a chain has at most ``size`` descriptors, so the work of one notification is bounded.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: RingAddresses,
        interrupt: Callable[[], None],
        *,
        event_idx: bool = False,
        indirect: bool = False,
        index: int = 0,
    ) -> None:
        """``index`` is the next available entry, not 0 for a queue that goes on after a stop;
        ``event_idx`` and ``indirect`` are whether the driver took VIRTIO_F_EVENT_IDX and
        VIRTIO_F_INDIRECT_DESC. Raises QueueError when a ring does not lie in guest memory."""
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise QueueError(f"a queue of size {size}, which is no power of two up to 32768")
        self.size = size
        self.memory = memory
        self.index = index & _WRAP
        """The next entry of the available ring to take; free-running, 16 bits."""
        self._interrupt = interrupt
        self._event_idx = event_idx
        self._indirect = indirect
        self._mask = size - 1
        # Alignment: virtio 1.2, 2.7, table of the three parts.
        self._table = self._area("descriptor table", addresses.descriptors, 16 * size, 16)
        self._avail = self._area("available ring", addresses.available, 6 + 2 * size, 2).cast("H")
        used = self._area("used ring", addresses.used, 6 + 8 * size, 4)
        self._used = used.cast("H")
        self._used_bytes = used
        self._used_index = int(self._used[1])
        self._signalled: int | None = None
        self._pushed = False
        # Taking a lock is a locked instruction, which on x86-64 is a full fence.
        self._fence = threading.Lock()

    def _area(self, name: str, address: int, size: int, alignment: int) -> memoryview:
        if address % alignment:
            raise QueueError(f"the {name} at {address:#x} is not aligned to {alignment}")
        try:
            return self.memory.view(address, size)
        except GuestMemoryError as error:
            raise QueueError(f"the {name} is outside of memory: {error}") from error

    # -- taking ---------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Chains the driver has made available and nobody has taken. Raises QueueError."""
        count = (self._avail[1] - self.index) & _WRAP
        if count > self.size:
            raise QueueError(f"{count} chains in a queue of {self.size}")
        return int(count)

    def pop(self) -> Chain | None:
        """The driver's next chain, or None. Raises QueueError."""
        index = self.index
        count = (self._avail[1] - index) & _WRAP
        if not count:
            return None
        if count > self.size:
            raise QueueError(f"{count} chains in a queue of {self.size}")
        chain = self._walk(self._avail[2 + (index & self._mask)])
        self.index = (index + 1) & _WRAP
        return chain

    def unpop(self, count: int = 1) -> None:
        """Put back the last ``count`` chains taken, none of them pushed: they come again."""
        self.index = (self.index - count) & _WRAP

    def _walk(self, head: int) -> Chain:
        chain = Chain(head)
        table = self._table
        entries = self.size
        inside = False
        index = head
        memory = self.memory
        left = self.size
        while left:
            if index >= entries:
                raise QueueError(f"descriptor {index} of a table of {entries}")
            address, length, flags, index = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & DESC_INDIRECT:
                if inside:
                    raise QueueError("an indirect descriptor in an indirect table")
                table, entries = self._indirect_table(address, length, flags)
                inside = True
                index = 0
                continue
            left -= 1
            try:
                pieces = memory.slices(address, length)
            except GuestMemoryError as error:
                raise QueueError(f"a descriptor leads out of memory: {error}") from error
            if flags & DESC_WRITE:
                chain.writable += pieces
                chain.writable_bytes += length
            elif chain.writable_bytes:
                raise QueueError("a readable descriptor after a writable one")
            else:
                chain.readable += pieces
                chain.readable_bytes += length
            if not flags & DESC_NEXT:
                return chain
        raise QueueError(f"a chain of more than {self.size} descriptors")

    def _indirect_table(self, address: int, length: int, flags: int) -> tuple[memoryview, int]:
        # virtio 1.2, 2.7.5.3.
        if not self._indirect:
            raise QueueError("an indirect descriptor, which was not negotiated")
        if flags & DESC_NEXT:
            raise QueueError("an indirect descriptor with a next one")
        if not length or length % 16:
            raise QueueError(f"an indirect table of {length} bytes")
        try:
            return self.memory.view(address, length), length // 16
        except GuestMemoryError as error:
            raise QueueError(f"an indirect table outside of memory: {error}") from error

    # -- giving back ----------------------------------------------------------------------

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back with the number of bytes written into it from its start. The
        driver can see it at once; ``notify`` makes it look."""
        index = self._used_index
        _USED.pack_into(self._used_bytes, 4 + 8 * (index & self._mask), chain.head, written)
        self._used_index = index = (index + 1) & _WRAP
        self._used[1] = index
        self._pushed = True

    def notify(self) -> None:
        """Interrupt the driver if chains were pushed since the last time and it wants to know
        (virtio 1.2, 2.7.7)."""
        if not self._pushed:
            return
        self._pushed = False
        with self._fence:
            pass  # the driver sees the used index before its wishes are read here
        if self._event_idx:
            new, old = self._used_index, self._signalled
            self._signalled = new
            event = self._avail[2 + self.size]
            if old is not None and ((new - event - 1) & _WRAP) >= ((new - old) & _WRAP):
                return
        elif self._avail[0] & AVAIL_NO_INTERRUPT:
            return
        self._interrupt()

    # -- kicks ----------------------------------------------------------------------------

    def disable_notifications(self) -> None:
        """Ask the driver not to kick: the device looks by itself. Only a hint."""
        if not self._event_idx:
            self._used[0] = USED_NO_NOTIFY
        # With VIRTIO_F_EVENT_IDX the event stays where it is, in the past.

    def enable_notifications(self) -> bool:
        """Ask the driver to kick for its next chain. True if there is one already, for which no
        kick may come: look again."""
        if self._event_idx:
            self._used[2 + 4 * self.size] = self.index
        else:
            self._used[0] = 0
        with self._fence:
            pass  # the driver sees the wish before its index is read here
        return bool(self._avail[1] != self.index)
