"""Many calls over one connection to a guest, each with its own answer and deadline."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from voidbus.vm.connect import Connected
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest import exec_messages
from voidbus.vm.guest.frames import (
    GUEST_STREAM_BIT,
    Frame,
    FrameDecoder,
    MessageType,
    ProtocolError,
    encode_message,
    split_message,
)
from voidbus.vm.guest.handshake import Flags
from voidbus.vm.sender import Sender

log = logging.getLogger(__name__)

_RECEIVE = 256 * 1024
_T = TypeVar("_T")


@dataclass
class Slot:
    """A call under way. Exactly one of the two callbacks ends it, once."""

    expected: MessageType
    deadline: float | None
    on_body: Callable[[bytes], None]
    on_fault: Callable[[ChannelFault], None]
    on_chunk: Callable[[bytes], None] | None = None
    """What comes beside the answer, in frames of the type ``chunk``."""
    chunk: MessageType = MessageType.EXEC_OUTPUT_CHUNK
    lasting: bool = False
    what: str = ""


class Multiplexer:
    """The part of a channel that knows requests and answers but not what they mean.

    It owns the socket, the reader thread and the sender; ``_close_connection`` releases them.
    """

    def __init__(
        self, connected: Connected, on_lost: Callable[[ChannelFault], None] | None, name: str
    ) -> None:
        self.flags = connected.flags
        self.dropped = 0
        """Frames that belonged to no call: late or invented."""
        self._sock = connected.sock
        self._on_lost = on_lost
        self._name = name
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._slots: dict[int, Slot] = {}
        self._ended: ChannelFault | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sender = Sender(self._sock, self._broken, f"{name}-send")
        self._reader = threading.Thread(target=self._read, name=f"{name}-read", daemon=True)

    def _close_connection(self) -> None:
        self._reader.join()
        self._sender.close()
        self._sock.close()
        os.close(self._wake)

    def _stream_frame(self, kind: MessageType, number: int, body: bytes) -> None:
        """A frame under an id the guest chose."""
        raise ProtocolError("a stream that was not asked for")

    # -- slots ----------------------------------------------------------------------------

    def _begin(self, slot: Slot, kind: MessageType, body: bytes) -> int:
        with self._lock:
            if self._ended is not None:
                raise ChannelFault(self._ended.reason, self._ended.detail)
            request_id = next(self._ids) % GUEST_STREAM_BIT
            self._slots[request_id] = slot
            if slot.deadline is not None:
                os.eventfd_write(self._wake, 1)
        try:
            self._sender.put(encode_message(kind, request_id, body))
        except (ChannelFault, ProtocolError):
            with self._lock:
                mine = self._slots.pop(request_id, None)
            if mine is None:
                return request_id  # its fault has been delivered meanwhile
            raise
        return request_id

    def _call(
        self, kind: MessageType, body: bytes, decode: Callable[[bytes], _T], timeout: float
    ) -> _T:
        self._refuse_on_reader()
        finished = threading.Event()
        results: list[_T] = []
        faults: list[ChannelFault] = []

        def done(answer: bytes) -> None:
            results.append(decode(answer))
            finished.set()

        def fault(reason: ChannelFault) -> None:
            faults.append(reason)
            finished.set()

        slot = Slot(
            MessageType(kind + 1),
            time.monotonic() + timeout,
            done,
            fault,
            what=kind.name.lower().replace("_", " "),
        )
        try:
            self._begin(slot, kind, body)
        except ProtocolError as error:
            raise ChannelFault(
                FaultReason.PROTOCOL, f"{slot.what} can't be sent: {error}"
            ) from None
        finished.wait()  # the slot's own deadline ends it
        if faults:
            raise faults[0]
        return results[0]

    def _refuse_on_reader(self) -> None:
        if threading.current_thread() is self._reader:
            raise RuntimeError("a blocking call from a channel callback would wait for itself")

    # -- reading --------------------------------------------------------------------------

    def _read(self) -> None:
        decoder = FrameDecoder()
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        fault = ChannelFault(FaultReason.LOST, "the guest closed the connection")
        try:
            while self._ended is None:
                ready = poll.poll(self._until_next_deadline())
                self._expire()
                for fd, _ in ready:
                    if fd == self._wake:
                        os.eventfd_read(self._wake)
                        continue
                    data = self._sock.recv(_RECEIVE)
                    if not data:
                        return
                    for frame in decoder.feed(data):
                        self._deliver(frame)
        except ProtocolError as error:
            fault = ChannelFault(FaultReason.PROTOCOL, str(error))
        except OSError as error:
            fault = ChannelFault(FaultReason.LOST, f"reading failed: {error}")
        finally:
            self._end(fault)

    def _until_next_deadline(self) -> float | None:
        with self._lock:
            times = [slot.deadline for slot in self._slots.values() if slot.deadline is not None]
        if not times:
            return None
        # poll's timeout is a C int; a deadline may be any time. It looks again in an hour.
        return min(max(0.0, min(times) - time.monotonic()) * 1000 + 1, 3_600_000.0)

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [
                (number, slot)
                for number, slot in self._slots.items()
                if slot.deadline is not None and slot.deadline <= now
            ]
            for number, _ in late:
                del self._slots[number]
        for number, slot in late:
            if slot.expected == MessageType.EXEC_RESPONSE and Flags.CONCURRENT in self.flags:
                with contextlib.suppress(ChannelFault):
                    body = exec_messages.encode_signal(9)
                    self._sender.put(encode_message(MessageType.SIGNAL, number, body))
            slot.on_fault(ChannelFault(FaultReason.DEADLINE, f"{slot.what}: no answer in time"))

    def _deliver(self, frame: Frame) -> None:
        kind = frame.known
        if kind is None:
            raise ProtocolError(f"frame of unknown type {frame.type}")
        if kind == MessageType.PONG:
            return
        request_id, body = split_message(frame.payload)
        if request_id & GUEST_STREAM_BIT:
            self._stream_frame(kind, request_id, body)
            return
        with self._lock:
            slot = self._slots.get(request_id)
            if slot is not None and kind == slot.expected and not slot.lasting:
                del self._slots[request_id]
        if slot is None:
            self.dropped += 1
        elif kind == slot.chunk and slot.on_chunk is not None:
            slot.on_chunk(body)
        elif kind == slot.expected:
            try:
                slot.on_body(body)
            except ProtocolError as error:
                if not slot.lasting:
                    slot.on_fault(ChannelFault(FaultReason.PROTOCOL, f"{slot.what}: {error}"))
                raise
        else:
            raise ProtocolError(f"{kind.name} in answer to {slot.what}")

    # -- the end --------------------------------------------------------------------------

    def _broken(self, detail: str) -> None:
        self._end(ChannelFault(FaultReason.LOST, detail))

    def _end(self, fault: ChannelFault) -> None:
        with self._lock:
            if self._ended is not None:
                return
            self._ended = fault
            slots = list(self._slots.values())
            self._slots.clear()
            os.eventfd_write(self._wake, 1)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for slot in slots:
            slot.on_fault(ChannelFault(fault.reason, f"{slot.what}: {fault.detail}"))
        if fault.reason != FaultReason.CLOSED and self._on_lost is not None:
            guarded(self._on_lost, fault)


def guarded(callback: Callable[..., None], *arguments: object) -> None:
    """Call someone's callback; its failure is its own and not the channel's."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a channel callback failed")
