"""One end of the filter: a Unix socket with frames on it, each after its length."""

from __future__ import annotations

import collections
import socket
from collections.abc import Iterator

from voidbus.vm.network.addresses import MAX_FRAME

BUFFER = 256 * 1024
"""Bytes that are taken in at a time."""

BACKLOG = 256 * 1024
"""Bytes that may wait to be sent before nothing more is read from the other end, and the filter's
own answers are dropped."""

PIECE = 33 * 1024
"""Bytes that are sent at a time, in whole frames. A Unix stream socket takes so many as one buffer,
all or nothing (Linux makes buffers of 32 KiB and a part of a page), so the other end never sees a
part of a frame. passt needs that: of a frame cut off it reads the rest once, and of a length cut
off nothing."""

SEND_BUFFER = 256 * 1024
"""Asked of the socket; twice ``PIECE`` at least is needed."""

_LENGTH = 4


class FrameError(Exception):
    """The bytes are not frames."""


class FramePort:
    """Frames in and out of a connected stream socket, which belongs to the port from now on.
    Nothing here waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket = sock
        self.buffer = bytearray(BUFFER)
        """What was received: ``frames`` tells where in it."""
        self._filled = 0
        self._pieces: collections.deque[bytes] = collections.deque()
        self._sent = 0
        self.waiting = 0
        """Bytes that wait to be sent."""

    def receive(self) -> bool:
        """Take in what there is. False at the end of the stream; an end in the middle of a frame
        is one as well."""
        try:
            with memoryview(self.buffer) as view:
                count = self.socket.recv_into(view[self._filled :])
        except (BlockingIOError, InterruptedError):
            return True
        except ConnectionError:
            return False
        self._filled += count
        return count > 0

    def frames(self) -> Iterator[tuple[int, int]]:
        """Where each whole frame that was received begins and ends in ``buffer``, once. Its length
        is in the 4 bytes before it. The buffer is valid until the iteration ends. Raises
        FrameError for one that is longer than any frame."""
        buffer = self.buffer
        filled = self._filled
        position = 0
        while filled - position >= _LENGTH:
            start = position + _LENGTH
            size = int.from_bytes(buffer[position:start])
            if size > MAX_FRAME:
                raise FrameError(f"a frame of {size} bytes; the longest has {MAX_FRAME}")
            if filled - start < size:
                break
            position = start + size
            yield start, position
        if position:
            left = filled - position
            buffer[:left] = buffer[position:filled]
            self._filled = left

    def send(self, piece: bytes) -> None:
        """Queue whole frames with their lengths: ``PIECE`` bytes or one frame."""
        self._pieces.append(piece)
        self.waiting += len(piece)

    def flush(self) -> bool:
        """Send what can be sent. False when the other end is gone."""
        try:
            while self._pieces:
                piece = self._pieces[0]
                if self._sent:
                    count = self.socket.send(memoryview(piece)[self._sent :], socket.MSG_NOSIGNAL)
                else:
                    count = self.socket.send(piece, socket.MSG_NOSIGNAL)
                self.waiting -= count
                self._sent += count
                if self._sent == len(piece):
                    self._pieces.popleft()
                    self._sent = 0
        except (BlockingIOError, InterruptedError):
            return True
        except ConnectionError:
            return False
        return True

    def close(self) -> None:
        """Close the socket. Again is fine."""
        self.socket.close()


def framed(frame: bytes) -> bytes:
    """A frame behind its length."""
    return len(frame).to_bytes(_LENGTH) + frame
