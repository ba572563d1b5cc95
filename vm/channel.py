"""The host's side of the guest channel: calls to the agent, many at a time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from voidbus.vm.connect import Connected
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.file_watching import FileWatching
from voidbus.vm.guest import (
    configure_messages,
    exec_messages,
    file_messages,
    outcome,
    port_messages,
    telemetry_messages,
)
from voidbus.vm.guest.exec_messages import ExecRequest
from voidbus.vm.guest.file_messages import FileStat
from voidbus.vm.guest.forward import StreamPump
from voidbus.vm.guest.frames import (
    MessageType,
    ProtocolError,
    encode_message,
)
from voidbus.vm.guest.handshake import Flags
from voidbus.vm.guest.telemetry_messages import TelemetryBatch
from voidbus.vm.multiplexer import Slot, guarded
from voidbus.vm.pty import PtyCall, PtyChannel

DEFAULT_EXEC_SECONDS = 1200.0
"""How long an exec without a limit of its own may take (protocol, "Exec")."""

EXEC_SLACK = 10.0
"""Seconds the guest gets beyond an exec's limit to report it itself."""


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


class GuestChannel(FileWatching):
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
        super().__init__(connected, on_lost, name)
        self.forwards: dict[int, int] = {}
        """Ports the guest listens on: the port asked for, to the port it really has."""
        self._env: tuple[tuple[str, str], ...] = ()
        self._dial = dial
        self._raw = Flags.RAW_BODIES in self.flags
        self._endpoints: dict[int, tuple[str, int] | Path] = {}
        self._pump: StreamPump | None = None
        self._ptys: list[PtyChannel] = []
        self._close_lock = threading.Lock()
        self._released = False
        self._reader.start()

    # -- calls ----------------------------------------------------------------------------

    def configure(
        self, message: configure_messages.Configure, timeout: float
    ) -> configure_messages.Configured:
        """Tell a guest that negotiated CONFIGURE what its programs get. Raises ChannelFault.
        ``configure_guest`` does this for every kind of guest."""
        body = configure_messages.encode_configure(message)
        return self._call(
            MessageType.CONFIGURE, body, configure_messages.decode_configured, timeout
        )

    def add_env(self, env: tuple[tuple[str, str], ...]) -> None:
        """Give every program of this channel these variables, under its own: for a guest that
        can't be told to do it itself."""
        self._env = env

    def exec(
        self,
        call: ExecCall,
        on_output: Callable[[exec_messages.Stream, bytes], None],
        on_done: Callable[[ExecResult | ChannelFault], None],
    ) -> ExecHandle:
        """Run a program. Never blocks, never raises for the channel's state: ``on_done`` comes
        exactly once whatever happens (on the calling thread if it can't even be sent)."""
        raw = self._raw
        limit = DEFAULT_EXEC_SECONDS if call.timeout is None else float(call.timeout)

        def chunk(body: bytes) -> None:
            message = exec_messages.decode_exec_chunk(body, raw=raw)
            guarded(on_output, message.stream, message.data)

        def done(body: bytes) -> None:
            message = exec_messages.decode_exec_response(body, raw=raw)
            guarded(on_done, ExecResult(*message))

        def fault(reason: ChannelFault) -> None:
            guarded(on_done, reason)

        request = ExecRequest(
            call.program,
            call.args,
            call.stdin,
            self._merged(call.env),
            call.working_dir,
            call.timeout,
        )
        slot = Slot(
            MessageType.EXEC_RESPONSE,
            time.monotonic() + limit + EXEC_SLACK if limit else None,
            done,
            fault,
            chunk,
            what=f"exec of {call.program!r}",
        )
        try:
            body = exec_messages.encode_exec_request(request, raw=raw)
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
            body = exec_messages.encode_signal(number)
            self._sender.put(encode_message(MessageType.SIGNAL, request_id, body))
        except ChannelFault:
            return False
        return True

    def write_file(
        self, path: str, content: bytes, timeout: float, *, create_parents: bool = True
    ) -> None:
        """Write a whole file. Raises ChannelFault; REFUSED with the guest's reason."""
        body = file_messages.encode_write_file(
            file_messages.WriteFile(path, content, create_parents), raw=self._raw
        )
        answer = self._call(MessageType.WRITE_FILE, body, outcome.decode_outcome, timeout)
        _require(answer.success, f"write of {path}", answer.error)

    def mkdir(self, path: str, timeout: float) -> None:
        """Make a directory and those above it. Raises ChannelFault."""
        body = file_messages.encode_path(path)
        answer = self._call(MessageType.MKDIR, body, outcome.decode_outcome, timeout)
        _require(answer.success, f"mkdir of {path}", answer.error)

    def read_file(self, path: str, timeout: float) -> bytes:
        """A whole file. Raises ChannelFault."""

        def decode(body: bytes) -> file_messages.FileContent:
            return file_messages.decode_file_content(body, raw=self._raw)

        body = file_messages.encode_path(path)
        answer = self._call(MessageType.READ_FILE, body, decode, timeout)
        _require(answer.success, f"read of {path}", answer.error)
        return answer.content

    def file_stat(self, path: str, timeout: float) -> FileStat:
        """Whether a path exists, and its size in bytes. Raises ChannelFault."""
        body = file_messages.encode_path(path)
        answer = self._call(MessageType.FILE_STAT, body, file_messages.decode_file_stat, timeout)
        _require(answer.error is None, f"stat of {path}", answer.error)
        return answer

    def ping(self, timeout: float) -> None:
        """Whether the agent answers. Raises ChannelFault when it does not in time."""
        # A question every guest knows: a second Ping would need the secret kept here.
        body = file_messages.encode_path("/")
        self._call(MessageType.FILE_STAT, body, file_messages.decode_file_stat, timeout)

    def shutdown(self, timeout: float) -> bool:
        """Ask the guest to power off; True when the connection ended within ``timeout`` seconds,
        False too when the guest can't be asked any more."""
        try:
            with self._lock:
                request_id = next(self._ids)
            self._sender.put(encode_message(MessageType.SHUTDOWN, request_id))
        except ChannelFault:
            return False
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
            guarded(on_batch, telemetry_messages.decode_telemetry(body))

        slot = Slot(
            MessageType.TELEMETRY_DATA, None, batch, lambda _: None, lasting=True, what="telemetry"
        )
        subscription = telemetry_messages.TelemetrySubscription(interval_ms, include_kernel_threads)
        body = telemetry_messages.encode_subscription(subscription)
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
        call = replace(call, env=self._merged(call.env))
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

        def decode(body: bytes) -> port_messages.Listening:
            listening = port_messages.decode_listening(body)
            if listening.error is None:
                # Before the next frame is read, which may open a stream to it.
                self._endpoints[listening.port] = host
            return listening

        body = port_messages.encode_port(port)
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
            self._end_watching()
            if self._pump is not None:
                self._pump.close()
            for pty in self._ptys:
                pty.close(0)
            self._close_connection()
            self._released = True

    def _merged(self, env: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        own = dict(env)
        return (*((name, value) for name, value in self._env if name not in own), *env)

    # -- forwards -------------------------------------------------------------------------

    def _stream_frame(self, kind: MessageType, number: int, body: bytes) -> None:
        pump = self._pump
        if pump is None:
            raise ProtocolError("a stream that was not asked for")
        if kind == MessageType.FORWARD_OPEN:
            endpoint = self._endpoints.get(port_messages.decode_port(body))
            # A guest may ask faster than its streams begin; each socket is a descriptor of ours.
            sock = None if endpoint is None or pump.full else _dial_endpoint(endpoint)
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


def _require(success: bool, what: str, error: str | None) -> None:
    if not success:
        raise ChannelFault(FaultReason.REFUSED, f"{what}: {error or 'no reason given'}")


def _dial_endpoint(endpoint: tuple[str, int] | Path) -> socket.socket | None:
    family = socket.AF_UNIX if isinstance(endpoint, Path) else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None  # out of descriptors, which is no fault of the channel
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
