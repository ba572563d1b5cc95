"""The vhost-user protocol's messages, as they come over a Unix socket with their descriptors.

Numbers and layouts are those of QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
import struct

from voidbus.vm.devices.faults import DeviceError

VERSION = 1
VERSION_MASK = 3
FLAG_REPLY = 4
FLAG_NEED_REPLY = 8

F_PROTOCOL_FEATURES = 1 << 30
"""The feature bit that says SET_PROTOCOL_FEATURES is understood."""

PROTOCOL_F_MQ = 1 << 0
PROTOCOL_F_REPLY_ACK = 1 << 3
PROTOCOL_F_CONFIG = 1 << 9

RING_MASK = 0xFF
NO_DESCRIPTOR = 0x100
"""In SET_VRING_KICK, _CALL and _ERR: the ring's number, and that no descriptor comes with it."""

MAX_REGIONS = 8
"""Memory regions, and so descriptors, of one message."""
MAX_CONFIG = 256
"""Bytes of a configuration space (VHOST_USER_MAX_CONFIG_SIZE in QEMU)."""
MAX_PAYLOAD = 512
"""The largest payload there is reason for: a memory table of 8 regions has 264 bytes, a
configuration 268."""

HEADER = struct.Struct("<III")
U64 = struct.Struct("<Q")
RING_STATE = struct.Struct("<II")
RING_ADDRESSES = struct.Struct("<IIQQQQ")
TABLE_HEADER = struct.Struct("<II")
TABLE_REGION = struct.Struct("<QQQQ")
CONFIG_HEADER = struct.Struct("<III")

_DESCRIPTOR_BYTES = array.array("i").itemsize


class Request(enum.IntEnum):
    """Messages of the front end that are understood."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


class FrontEndGone(Exception):
    """The front end closed its connection."""


class Message:
    """One message. It owns the descriptors that came with it, until they are taken."""

    __slots__ = ("fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The payload, which must be of exactly this layout. Raises DeviceError."""
        if len(self.payload) != layout.size:
            raise DeviceError(
                f"vhost-user: message {self.request} with {len(self.payload)} bytes of payload "
                f"instead of {layout.size}"
            )
        return layout.unpack(self.payload)

    def take_fd(self) -> int:
        """The one descriptor of this message, now the caller's. Raises DeviceError."""
        if len(self.fds) != 1:
            raise DeviceError(
                f"vhost-user: message {self.request} with {len(self.fds)} descriptors instead of 1"
            )
        return self.fds.pop()

    def close(self) -> None:
        """Close the descriptors nobody took."""
        close_all(self.fds)


def close_all(fds: list[int]) -> None:
    """Close descriptors and empty the list."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


class FrontEnd:
    """The connection to a front end, non-blocking. It owns the socket and whatever descriptors
    have arrived with the message under way."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._data = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """The next message, or None if it is not all here yet. Raises FrontEndGone, or
        DeviceError for what is no message."""
        if len(self._data) < HEADER.size and not self._fill(HEADER.size):
            return None
        request, flags, size = HEADER.unpack_from(self._data)
        if flags & VERSION_MASK != VERSION or flags & FLAG_REPLY or size > MAX_PAYLOAD:
            raise DeviceError(
                f"vhost-user: no message: request {request}, flags {flags:#x}, {size} bytes"
            )
        if not self._fill(HEADER.size + size):
            return None
        message = Message(request, flags, bytes(self._data[HEADER.size :]), self._fds)
        self._data.clear()
        self._fds = []
        return message

    def _fill(self, size: int) -> bool:
        """Read until there are ``size`` bytes of the message; False if they are not here yet."""
        while len(self._data) < size:
            try:
                # Never past the end of a message: descriptors come with the first byte of theirs.
                data, ancillary, flags, _ = self._sock.recvmsg(
                    size - len(self._data),
                    socket.CMSG_SPACE(MAX_REGIONS * _DESCRIPTOR_BYTES),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return False
            except OSError as error:
                raise FrontEndGone(str(error)) from error
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    whole = len(content) - len(content) % _DESCRIPTOR_BYTES
                    self._fds.extend(array.array("i", content[:whole]))
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_REGIONS:
                raise DeviceError("vhost-user: a message with too many descriptors")
            if not data:
                raise FrontEndGone("closed")
            self._data += data
        return True

    def reply(self, request: int, payload: bytes) -> None:
        """Answer a message. Raises FrontEndGone, or DeviceError if answers are not read."""
        data = HEADER.pack(request, VERSION | FLAG_REPLY, len(payload)) + payload
        try:
            sent = self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise FrontEndGone(str(error)) from error
        if sent != len(data):
            raise DeviceError("vhost-user: the front end does not read its answers")

    def close(self) -> None:
        """Close the socket and the descriptors that had come."""
        close_all(self._fds)
        self._sock.close()
