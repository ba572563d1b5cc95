"""The connection to a vhost-user back end: a program that serves a device's queues in our place.

QEMU's docs/interop/vhost-user.rst is the specification. The back end is trusted as little as the
guest, whose requests it reads: what it says is checked, and no call here waits for it longer than
ANSWER_SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence

from voidbus.vm.devices.device import F_VERSION_1
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import SharedRegion
from voidbus.vm.devices.vhost_user_messages import (
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_REGIONS,
    PROTOCOL_F_MQ,
    PROTOCOL_F_REPLY_ACK,
    RING_ADDRESSES,
    RING_STATE,
    TABLE_HEADER,
    TABLE_REGION,
    U64,
    VERSION,
    VERSION_MASK,
    Request,
)
from voidbus.vm.devices.virtqueue import RingAddresses

ANSWER_SECONDS = 5.0
"""How long all answers of one call may take together. A driver that comes up makes three calls, for
which a vCPU waits LOOP_SECONDS."""

_FLAGS = VERSION_MASK | FLAG_REPLY


class BackEndError(DeviceError):
    """The back end has gone, or does not keep to the protocol: which, at what message."""


class BackEnd:
    """One back end. It owns the socket. For one thread, but for ``hang_up``.

    Each message is answered before the next is sent, so that an error is known to be its own.
    Addresses are the guest's: what a back end takes for ours is but a name for them, and it need
    not know where in this process the memory is.
    """

    def __init__(self, sock: socket.socket, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._sock = sock
        self._answer_seconds = answer_seconds
        self._hung_up = threading.Event()

    @property
    def over(self) -> bool:
        """Whether we have hung up."""
        return self._hung_up.is_set()

    def fileno(self) -> int:
        """Readable when the back end has gone; between messages it has nothing to say."""
        return self._sock.fileno()

    def greet(self, queues: int, patience: float) -> int:
        """Begin, with a back end that must have so many queues, within ``patience`` seconds. The
        features it offers. Raises BackEndError."""
        deadline = time.monotonic() + patience
        offered = self._ask_number(Request.GET_FEATURES, deadline)
        needed = F_PROTOCOL_FEATURES | F_VERSION_1
        if offered & needed != needed:
            raise self._error(f"it offers the features {offered:#x}, and {needed:#x} are needed")
        can = self._ask_number(Request.GET_PROTOCOL_FEATURES, deadline)
        if not can & PROTOCOL_F_REPLY_ACK:
            raise self._error("it acknowledges no message (VHOST_USER_PROTOCOL_F_REPLY_ACK)")
        several = can & PROTOCOL_F_MQ
        taken = U64.pack(PROTOCOL_F_REPLY_ACK | several)
        # Acknowledged are those after it.
        self._send(Request.SET_PROTOCOL_FEATURES, deadline, taken)
        self._tell(Request.SET_OWNER, deadline)
        has = self._ask_number(Request.GET_QUEUE_NUM, deadline) if several else queues
        if has < queues:
            raise self._error(f"it has {has} queues, and {queues} are needed")
        return offered & ~F_PROTOCOL_FEATURES

    def set_up(self, features: int, regions: Sequence[SharedRegion]) -> None:
        """Tell of a driver: what it took of the features, and the guest's memory. Raises
        BackEndError."""
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} regions; {MAX_REGIONS} at most")
        deadline = self._deadline()
        self._tell(Request.SET_FEATURES, deadline, U64.pack(features | F_PROTOCOL_FEATURES))
        table = TABLE_HEADER.pack(len(regions), 0) + b"".join(
            TABLE_REGION.pack(region.address, region.size, region.address, region.offset)
            for region in regions
        )
        self._tell(Request.SET_MEM_TABLE, deadline, table, [region.file for region in regions])

    def start_ring(
        self, index: int, size: int, areas: RingAddresses, kick: int, interrupt: int
    ) -> None:
        """Have it serve a queue; it gets both eventfds. Raises BackEndError."""
        deadline = self._deadline()
        self._tell(Request.SET_VRING_NUM, deadline, RING_STATE.pack(index, size))
        self._tell(Request.SET_VRING_BASE, deadline, RING_STATE.pack(index, 0))
        addresses = (areas.descriptors, areas.used, areas.available)
        place = RING_ADDRESSES.pack(index, 0, *addresses, 0)
        self._tell(Request.SET_VRING_ADDR, deadline, place)
        self._tell(Request.SET_VRING_CALL, deadline, U64.pack(index), [interrupt])
        self._tell(Request.SET_VRING_KICK, deadline, U64.pack(index), [kick])
        self._tell(Request.SET_VRING_ENABLE, deadline, RING_STATE.pack(index, 1))

    def stop_ring(self, index: int) -> None:
        """Have it serve a queue no more, which it promises with its answer. Raises
        BackEndError."""
        deadline = self._deadline()
        self._send(Request.GET_VRING_BASE, deadline, RING_STATE.pack(index, 0))
        stopped, _ = self._receive(Request.GET_VRING_BASE, deadline, RING_STATE)
        if stopped != index:
            raise self._error(f"it stopped queue {stopped}, and not {index}")

    def hang_up(self) -> None:
        """End the connection, which for the back end is the machine's end. Whoever waits for an
        answer gets a BackEndError. Any thread; again is fine."""
        self._hung_up.set()
        with contextlib.suppress(OSError):  # it is closed, or the other end is
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. Again is fine."""
        self._sock.close()

    # -- messages ---------------------------------------------------------------------------

    def _deadline(self) -> float:
        return time.monotonic() + self._answer_seconds

    def _tell(
        self, request: Request, deadline: float, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """Send a message, and wait until it is acknowledged."""
        self._send(request, deadline, payload, fds, FLAG_NEED_REPLY)
        (refused,) = self._receive(request, deadline, U64)
        if refused:
            raise self._error(f"it refused message {request.name}")

    def _ask_number(self, request: Request, deadline: float) -> int:
        self._send(request, deadline)
        return self._receive(request, deadline, U64)[0]

    def _send(
        self,
        request: Request,
        deadline: float,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = 0,
    ) -> None:
        message = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        if self.over:
            raise self._error("we have hung up")
        try:
            self._wait_until(deadline)
            sent = socket.send_fds(self._sock, [message], list(fds), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._gone(request, error) from error
        if sent != len(message):
            raise self._error(f"it does not read message {request.name}")

    def _receive(self, request: Request, deadline: float, layout: struct.Struct) -> tuple[int, ...]:
        answered, flags, size = HEADER.unpack(self._exactly(request, HEADER.size, deadline))
        if (answered, flags & _FLAGS, size) != (request, VERSION | FLAG_REPLY, layout.size):
            raise self._error(
                f"it answered {request.name} with message {answered}, flags {flags:#x} and {size} "
                "bytes"
            )
        return layout.unpack(self._exactly(request, size, deadline))

    def _exactly(self, request: Request, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            try:
                self._wait_until(deadline)
                piece = self._sock.recv(size - len(data))
            except OSError as error:
                raise self._gone(request, error) from error
            if not piece:
                raise self._gone(request, ConnectionError("it has closed the connection"))
            data += piece
        return data

    def _wait_until(self, deadline: float) -> None:
        """Have the socket's next call end then. Raises TimeoutError."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def _gone(self, request: Request, error: OSError) -> BackEndError:
        if isinstance(error, TimeoutError):
            return self._error(f"message {request.name}: no answer in time")
        why = os.strerror(error.errno) if error.errno else str(error)
        return self._error(f"message {request.name}: {why}")

    def _error(self, what: str) -> BackEndError:
        return BackEndError(f"vhost-user: {what}")
