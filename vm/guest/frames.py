"""Frames of the host-guest protocol, version 2: how bytes become typed payloads.

A frame is ``[u32 LE payload length][u8 type][payload]``. Once a connection is
authenticated every payload begins with a ``u32 LE`` request id.

Standard library only: the same file runs inside guests.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

HEADER = struct.Struct("<IB")
REQUEST_ID = struct.Struct("<I")

MAX_PAYLOAD = 64 * 1024 * 1024
"""Largest payload in bytes, the length exactly this included (protocol, "Frame")."""

GUEST_PORT = 1234
"""The vsock port the guest agent listens on (protocol, "Handshake")."""

GUEST_STREAM_BIT = 0x8000_0000
"""Request ids with this bit are chosen by the guest (forwarded streams); others by the host."""


class ProtocolError(Exception):
    """The peer sent bytes that are not the protocol. The connection is of no more use."""


class MessageType(enum.IntEnum):
    """Frame types. 1 to 27 are the base protocol, 28 and up exist only when negotiated."""

    EXEC_REQUEST = 1
    EXEC_RESPONSE = 2
    PING = 3
    PONG = 4
    SHUTDOWN = 5
    FILE_TRANSFER = 6
    FILE_TRANSFER_RESPONSE = 7
    TELEMETRY_DATA = 8
    TELEMETRY_ACK = 9
    SUBSCRIBE_TELEMETRY = 10
    WRITE_FILE = 11
    WRITE_FILE_RESPONSE = 12
    MKDIR = 13
    MKDIR_RESPONSE = 14
    EXEC_OUTPUT_CHUNK = 15
    EXEC_OUTPUT_ACK = 16
    SNAPSHOT_READY = 17
    READ_FILE = 18
    READ_FILE_RESPONSE = 19
    FILE_STAT = 20
    FILE_STAT_RESPONSE = 21
    PTY_OPEN = 22
    PTY_OPENED = 23
    PTY_DATA = 24
    PTY_RESIZE = 25
    PTY_CLOSE = 26
    PTY_CLOSED = 27
    # Extensions. CONCURRENT:
    SIGNAL = 28
    """Host to guest, under the request id of a running exec: ``{"signal": n}``. No reply."""
    # PORT_FORWARD; see forward.py for the stream rules:
    FORWARD_LISTEN = 29
    """Host to guest ``{"port": n}``, 0 to let the guest choose."""
    FORWARD_LISTENING = 30
    """Guest to host ``{"port": n, "error": null}``."""
    FORWARD_OPEN = 31
    """Guest to host under a new stream id: ``{"port": n}``, a program connected to that port."""
    FORWARD_DATA = 32
    """Either way: raw bytes of the stream."""
    FORWARD_WINDOW = 33
    """Either way: ``u32 LE``, that many more bytes may be sent on the stream."""
    FORWARD_CLOSE = 34
    """Either way: ``u8``, 0 the sender sends no more, 1 the stream is gone in both directions."""
    # CONFIGURE; see rules.py:
    CONFIGURE = 35
    """Host to guest, once a machine: what programs get and must keep to, and the time."""
    CONFIGURED = 36
    """Guest to host: what went wrong while the machine booted, or why it is refused."""
    # WATCH_FILES; see file_watch.py:
    WATCH_FILE = 37
    """Host to guest ``{"path": p}``: tell of this file for as long as the connection lasts."""
    WATCH_FILE_RESPONSE = 38
    """Guest to host ``{"success": b, "error": null}``: it is watched, or why it is not."""
    FILE_CHANGED = 39
    """Guest to host under the watch's request id: the file is complete, as FileStat says it."""


LAST_BASE_TYPE = MessageType.PTY_CLOSED
_TYPES = {int(kind): kind for kind in MessageType}


class Frame(NamedTuple):
    """One frame. ``type`` may be a number that is no ``MessageType``: the guest skips those."""

    type: int
    payload: bytes

    @property
    def known(self) -> MessageType | None:
        """The message type, or None for a number nobody has defined."""
        return _TYPES.get(self.type)


def encode_frame(kind: int, payload: bytes) -> bytes:
    """The bytes of one frame. Raises ProtocolError when the payload is over the cap."""
    if len(payload) > MAX_PAYLOAD:
        raise ProtocolError(f"payload of {len(payload)} bytes is over the {MAX_PAYLOAD} byte cap")
    return HEADER.pack(len(payload), kind) + payload


def encode_message(kind: int, request_id: int, body: bytes = b"") -> bytes:
    """The bytes of one frame of an authenticated connection."""
    return encode_frame(kind, REQUEST_ID.pack(request_id) + body)


def split_message(payload: bytes) -> tuple[int, bytes]:
    """Request id and body of a payload. Raises ProtocolError when it is under four bytes."""
    if len(payload) < REQUEST_ID.size:
        raise ProtocolError(f"payload of {len(payload)} bytes is too short for a request id")
    return REQUEST_ID.unpack_from(payload)[0], payload[REQUEST_ID.size :]


class FrameDecoder:
    """Cuts a byte stream into frames, holding at most one unfinished payload.

    ``limit`` is the largest payload accepted, in bytes; a header that names more raises
    before any of the body is kept. After a ProtocolError the decoder stays broken.
    """

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._needed = HEADER.size
        self._broken: str | None = None

    @property
    def buffered(self) -> int:
        """Bytes held for a frame that is not complete."""
        return len(self._buffer)

    def set_limit(self, limit: int) -> None:
        """Change the largest payload accepted from the next header on."""
        self._limit = limit

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """Take bytes as they came and return the frames they complete.

        Raises ProtocolError when a header names a payload over the limit.
        """
        if self._broken is not None:
            raise ProtocolError(self._broken)
        frames: list[Frame] = []
        view = memoryview(data)
        position = 0
        while True:
            # Only what the current header or body still lacks is copied.
            take = min(self._needed - len(self._buffer), len(view) - position)
            if take > 0:
                self._buffer += view[position : position + take]
                position += take
            if len(self._buffer) < self._needed:
                return frames
            length, kind = HEADER.unpack_from(self._buffer)
            if self._needed == HEADER.size and length > 0:
                if length > self._limit:
                    self._buffer.clear()
                    self._broken = f"frame of {length} bytes is over the {self._limit} byte cap"
                    raise ProtocolError(self._broken)
                self._needed = HEADER.size + length
                continue
            frames.append(Frame(kind, bytes(memoryview(self._buffer)[HEADER.size :])))
            self._buffer = bytearray()
            self._needed = HEADER.size
