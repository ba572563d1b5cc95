"""The host's side of the guest channel: calls to the agent, many at a time."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from voidbus.vm.connect import Connected
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest import messages
from voidbus.vm.guest.forward import StreamPump
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
from voidbus.vm.guest.messages import ExecRequest, FileStat, TelemetryBatch
from voidbus.vm.pty import PtyCall, PtyChannel
from voidbus.vm.sender import Sender

log = logging.getLogger(__name__)

DEFAULT_EXEC_SECONDS = 1200.0
"""How long an exec without a limit of its own may take (protocol, "Exec")."""

EXEC_SLACK = 10.0
"""Seconds the guest gets beyond an exec's limit to report it itself."""

_RECEIVE = 256 * 1024
_T = TypeVar("_T")


@dataclass(frozen=True)
class ExecCall:
    """A program to run. ``timeout`` in whole seconds: None means the default limit, 0 none."""

    program: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    stdin: bytes = field(default=b"", repr=False)
    working_dir: str | None = None
    timeout: int | None = None


@dataclass(frozen=True)
class ExecResult:
    """How an exec ended: ``exit_code`` -1 with an ``error`` when it did not exit by itself,
    ``signal`` then if known. ``stdout`` and ``stderr`` are complete, or with ``truncated``
    their end."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    error: str | None
    duration_ms: int | None
    signal: int | None
    truncated: bool


class ExecHandle:
    """A running exec."""

    def __init__(self, channel: GuestChannel, request_id: int) -> None:
        self._channel = channel
        self.request_id = request_id

    def signal(self, number: int) -> bool:
        """Signal the program's process group; False when this guest can't or the channel is
        gone. The exec ends by its own answer, as ever."""
        return self._channel.send_signal(self.request_id, number)


@dataclass
class _Slot:
    """A call under way. Exactly one of the two callbacks ends it, once."""

    expected: MessageType
    deadline: float | None
    on_body: Callable[[bytes], None]
    on_fault: Callable[[ChannelFault], None]
    on_chunk: Callable[[bytes], None] | None = None
    lasting: bool = False
    what: str = ""


class GuestChannel:
    """One authenticated connection to a guest agent.

    Calls are safe from any thread. Callbacks run on the channel's reader thread: they must be
    quick, and a slow one slows the guest's output down rather than filling memory. The
    blocking calls must not be made from a callback. Every call ends: with its result, or with
    a ChannelFault when the channel ends or time is up.

    ``dial`` opens further connections for terminals. ``on_lost`` is called once, on a thread
    of the channel, when it ends other than by ``close``.
    """

    def __init__(
        self,
        connected: Connected,
        *,
        dial: Callable[[float], Connected],
        on_lost: Callable[[ChannelFault], None] | None = None,
        name: str = "guest",
    ) -> None:
        self.flags = connected.flags
        self.forwards: dict[int, int] = {}
        """Ports the guest listens on: the port asked for, to the port it really has."""
        self._sock = connected.sock
        self._dial = dial
        self._on_lost = on_lost
        self._name = name
        self._raw = Flags.RAW_BODIES in self.flags
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._slots: dict[int, _Slot] = {}
        self._ended: ChannelFault | None = None
        self._endpoints: dict[int, tuple[str, int] | Path] = {}
        self._pump: StreamPump | None = None
        self._ptys: list[PtyChannel] = []
        self._close_lock = threading.Lock()
        self._released = False
        self.dropped = 0
        """Frames that belonged to no call: late or invented."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sender = Sender(self._sock, self._broken, f"{name}-send")
        self._reader = threading.Thread(target=self._read, name=f"{name}-read", daemon=True)
        self._reader.start()

    # -- calls ----------------------------------------------------------------------------

    def exec(
        self,
        call: ExecCall,
        on_output: Callable[[messages.Stream, bytes], None],
        on_done: Callable[[ExecResult | ChannelFault], None],
    ) -> ExecHandle:
        """Run a program. Never blocks, never raises for the channel's state: ``on_done`` comes
        exactly once whatever happens (on the calling thread if it can't even be sent)."""
        raw = self._raw
        limit = DEFAULT_EXEC_SECONDS if call.timeout is None else float(call.timeout)

        def chunk(body: bytes) -> None:
            message = messages.decode_exec_chunk(body, raw=raw)
            _guarded(on_output, message.stream, message.data)

        def done(body: bytes) -> None:
            message = messages.decode_exec_response(body, raw=raw)
            _guarded(on_done, ExecResult(*message))

        def fault(reason: ChannelFault) -> None:
            _guarded(on_done, reason)

        request = ExecRequest(
            call.program, call.args, call.stdin, call.env, call.working_dir, call.timeout
        )
        slot = _Slot(
            MessageType.EXEC_RESPONSE,
            time.monotonic() + limit + EXEC_SLACK if limit else None,
            done,
            fault,
            chunk,
            what=f"exec of {call.program!r}",
        )
        try:
            body = messages.encode_exec_request(request, raw=raw)
            request_id = self._begin(slot, MessageType.EXEC_REQUEST, body)
        except ChannelFault as reason:
            fault(reason)
            request_id = 0
        except (ProtocolError, ValueError) as error:
            fault(ChannelFault(FaultReason.PROTOCOL, f"{slot.what} can't be sent: {error}"))
            request_id = 0
        return ExecHandle(self, request_id)

    def send_signal(self, request_id: int, number: int) -> bool:
        """See ``ExecHandle.signal``."""
        if Flags.CONCURRENT not in self.flags or request_id not in self._slots:
            return False
        try:
            body = messages.encode_signal(number)
            self._sender.put(encode_message(MessageType.SIGNAL, request_id, body))
        except ChannelFault:
            return False
        return True

    def write_file(
        self, path: str, content: bytes, timeout: float, *, create_parents: bool = True
    ) -> None:
        """Write a whole file. Raises ChannelFault; REFUSED with the guest's reason."""
        body = messages.encode_write_file(
            messages.WriteFile(path, content, create_parents), raw=self._raw
        )
        answer = self._call(MessageType.WRITE_FILE, body, messages.decode_outcome, timeout)
        _require(answer.success, f"write of {path}", answer.error)

    def mkdir(self, path: str, timeout: float) -> None:
        """Make a directory and those above it. Raises ChannelFault."""
        body = messages.encode_path(path)
        answer = self._call(MessageType.MKDIR, body, messages.decode_outcome, timeout)
        _require(answer.success, f"mkdir of {path}", answer.error)

    def read_file(self, path: str, timeout: float) -> bytes:
        """A whole file. Raises ChannelFault."""

        def decode(body: bytes) -> messages.FileContent:
            return messages.decode_file_content(body, raw=self._raw)

        body = messages.encode_path(path)
        answer = self._call(MessageType.READ_FILE, body, decode, timeout)
        _require(answer.success, f"read of {path}", answer.error)
        return answer.content

    def file_stat(self, path: str, timeout: float) -> FileStat:
        """Whether a path exists, and its size in bytes. Raises ChannelFault."""
        body = messages.encode_path(path)
        answer = self._call(MessageType.FILE_STAT, body, messages.decode_file_stat, timeout)
        _require(answer.error is None, f"stat of {path}", answer.error)
        return answer

    def ping(self, timeout: float) -> None:
        """Whether the agent answers. Raises ChannelFault when it does not in time."""
        # A question every guest knows: a second Ping would need the secret kept here.
        body = messages.encode_path("/")
        self._call(MessageType.FILE_STAT, body, messages.decode_file_stat, timeout)

    def shutdown(self, timeout: float) -> bool:
        """Ask the guest to power off; True when the connection ended within ``timeout``."""
        try:
            with self._lock:
                request_id = next(self._ids)
            self._sender.put(encode_message(MessageType.SHUTDOWN, request_id))
        except ChannelFault:
            return self._ended is not None
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def subscribe_telemetry(
        self,
        interval_ms: int,
        on_batch: Callable[[TelemetryBatch], None],
        *,
        include_kernel_threads: bool = False,
    ) -> None:
        """Get batches for as long as the channel lasts. Raises ChannelFault."""

        def batch(body: bytes) -> None:
            _guarded(on_batch, messages.decode_telemetry(body))

        slot = _Slot(
            MessageType.TELEMETRY_DATA, None, batch, lambda _: None, lasting=True, what="telemetry"
        )
        subscription = messages.TelemetrySubscription(interval_ms, include_kernel_threads)
        body = messages.encode_subscription(subscription)
        self._begin(slot, MessageType.SUBSCRIBE_TELEMETRY, body)

    def open_pty(
        self,
        call: PtyCall,
        on_data: Callable[[bytes], None],
        on_closed: Callable[[int | ChannelFault], None],
        timeout: float,
    ) -> PtyChannel:
        """A program on a terminal, over a connection of its own. ``on_closed`` comes once
        with the exit code or a fault. Raises ChannelFault when it does not open."""
        self._refuse_on_reader()
        deadline = time.monotonic() + timeout
        pty = PtyChannel(self._dial(timeout), call, on_data, on_closed, f"{self._name}-pty")
        with self._lock:
            self._ptys = [other for other in self._ptys if not other.ended]
            self._ptys.append(pty)
            ended = self._ended
        if ended is not None:
            pty.close(0)
            raise ended
        pty.wait_open(max(0.0, deadline - time.monotonic()))
        return pty

    def listen_forward(self, port: int, host: tuple[str, int] | Path, timeout: float) -> int:
        """Have the guest listen on a port of its loopback (0: one it chooses) and carry each
        connection to ``host``. The port it has. Raises ChannelFault."""
        if Flags.PORT_FORWARD not in self.flags:
            raise ChannelFault(FaultReason.UNSUPPORTED, "this guest does not forward ports")
        with self._lock:
            if self._ended is not None:
                raise self._ended
            if self._pump is None:
                self._pump = StreamPump(self._send_stream, f"{self._name}-forward")
            if port:
                self._endpoints[port] = host

        def decode(body: bytes) -> messages.Listening:
            listening = messages.decode_listening(body)
            if listening.error is None:
                # Before the next frame is read, which may open a stream to it.
                self._endpoints[listening.port] = host
            return listening

        body = messages.encode_port(port)
        answer = self._call(MessageType.FORWARD_LISTEN, body, decode, timeout)
        _require(answer.error is None, f"forward of port {port}", answer.error)
        self.forwards[port] = answer.port
        return answer.port

    def close(self) -> None:
        """End the channel: pending calls get a CLOSED fault, threads are joined, descriptors
        closed. Again is fine, from any thread but the channel's own."""
        self._end(ChannelFault(FaultReason.CLOSED, "the channel was closed"))
        with self._close_lock:
            if self._released:
                return
            self._refuse_on_reader()
            self._reader.join()
            self._sender.close()
            if self._pump is not None:
                self._pump.close()
            for pty in self._ptys:
                pty.close(0)
            self._sock.close()
            os.close(self._wake)
            self._released = True

    # -- slots ----------------------------------------------------------------------------

    def _begin(self, slot: _Slot, kind: MessageType, body: bytes) -> int:
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

        slot = _Slot(
            MessageType(kind + 1),
            time.monotonic() + timeout,
            done,
            fault,
            what=kind.name.lower().replace("_", " "),
        )
        try:
            self._begin(slot, kind, body)
        except ProtocolError as error:
            raise ChannelFault(FaultReason.PROTOCOL, f"{slot.what} can't be sent: {error}") from None
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
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

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
            if slot.on_chunk is not None and Flags.CONCURRENT in self.flags:
                with contextlib.suppress(ChannelFault):
                    body = messages.encode_signal(9)
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
        elif kind == MessageType.EXEC_OUTPUT_CHUNK and slot.on_chunk is not None:
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

    # -- forwards -------------------------------------------------------------------------

    def _stream_frame(self, kind: MessageType, number: int, body: bytes) -> None:
        pump = self._pump
        if pump is None:
            raise ProtocolError("a stream that was not asked for")
        if kind == MessageType.FORWARD_OPEN:
            endpoint = self._endpoints.get(messages.decode_port(body))
            sock = None if endpoint is None else _dial_endpoint(endpoint)
            if sock is None:
                self._send_stream(MessageType.FORWARD_CLOSE, number, b"\x01")
            else:
                pump.attach(number, sock)
        elif kind in (
            MessageType.FORWARD_DATA,
            MessageType.FORWARD_WINDOW,
            MessageType.FORWARD_CLOSE,
        ):
            pump.handle(kind, number, body)
        else:
            raise ProtocolError(f"{kind.name} on a stream")

    def _send_stream(self, kind: MessageType, number: int, body: bytes) -> None:
        try:
            self._sender.put(encode_message(kind, number, body))
        except ChannelFault as fault:
            raise OSError(fault.detail) from None

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
            _guarded(self._on_lost, fault)


def _require(success: bool, what: str, error: str | None) -> None:
    if not success:
        raise ChannelFault(FaultReason.REFUSED, f"{what}: {error or 'no reason given'}")


def _guarded(callback: Callable[..., None], *arguments: object) -> None:
    """Call someone's callback; its failure is its own and not the channel's."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a channel callback failed")


def _dial_endpoint(endpoint: tuple[str, int] | Path) -> socket.socket | None:
    family = socket.AF_UNIX if isinstance(endpoint, Path) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    address = str(endpoint) if isinstance(endpoint, Path) else endpoint
    try:
        sock.connect(address)
    except BlockingIOError:
        # TCP goes on connecting; a Unix socket's queue is full, which is a refusal.
        if isinstance(endpoint, Path):
            sock.close()
            return None
    except OSError:
        sock.close()
        return None
    return sock
