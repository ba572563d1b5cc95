"""One connection from the host: its handshake, its requests, its answers."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from .configure_messages import Configure, Configured, decode_configure, encode_configured
from .descendants import Children
from .exec_messages import (
    CHUNK_BYTES,
    CHUNK_BYTES_RAW,
    ExecChunk,
    ExecResponse,
    decode_exec_request,
    decode_signal,
    encode_exec_chunk,
    encode_exec_response,
)
from .execution import Execution, unstarted
from .file_requests import FileRequests
from .files import Files
from .forward import StreamPump
from .frames import (
    MAX_PAYLOAD,
    Frame,
    FrameDecoder,
    MessageType,
    ProtocolError,
    encode_frame,
    encode_message,
    split_message,
)
from .handshake import BASE_PROTOCOL, Flags, accepts, decode_ping, encode_pong
from .identity import Identity
from .outcome import Outcome, encode_outcome
from .place import Place
from .port_messages import Listening, decode_port, encode_listening
from .pty_messages import decode_pty_open
from .pty_session import MAX_SESSIONS, PtySession
from .rules import Rules
from .telemetry import MIN_INTERVAL_MS, Telemetry
from .telemetry_messages import TelemetrySubscription, decode_subscription, encode_telemetry

HANDSHAKE_SECONDS = 10.0
"""How long a connection may take to authenticate."""

HANDSHAKE_PAYLOAD = 256
"""Largest payload taken from a peer that has not authenticated."""

KEEP_BYTES = 1024 * 1024
"""Output of each stream repeated in the response to a CONCURRENT host: its end. That host
has had every chunk already."""

KEEP_BYTES_BASE = 7 * 1024 * 1024
"""The same for a base-protocol host, which expects all of it: a byte takes up to four
characters as JSON, and both streams must fit one 64 MiB frame."""

MAX_EXECS = 128
"""Programs running at a time, over all connections."""

_RECEIVE = 256 * 1024


class Host(Protocol):
    """What a connection needs of the agent it belongs to."""

    secret: bytes
    flags: Flags
    place: Place
    files: Files
    children: Children
    identity: Identity | None
    exec_slots: threading.BoundedSemaphore
    pty_slots: threading.BoundedSemaphore
    telemetry_root: int | None

    rules: Rules

    def configure(self, message: Configure) -> Configured: ...
    def request_shutdown(self) -> None: ...
    def log(self, text: str) -> None: ...


class Connection:
    """Serves one stream socket until it ends. ``run`` belongs to one thread; ``close`` may be
    called from any and makes ``run`` return, after everything the connection started ended."""

    def __init__(self, sock: socket.socket, host: Host) -> None:
        self._sock = sock
        self._host = host
        self._decoder = FrameDecoder(HANDSHAKE_PAYLOAD)
        self._flags: Flags | None = None
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()
        self._execs: dict[int, Execution] = {}
        self._threads: set[threading.Thread] = set()
        self._closing = threading.Event()
        self._files = FileRequests(host.files, host.place, self._send)
        self._pump: StreamPump | None = None
        self._pty: PtySession | None = None

    @property
    def _raw(self) -> bool:
        return self._flags is not None and Flags.RAW_BODIES in self._flags

    @property
    def _concurrent(self) -> bool:
        return self._flags is not None and Flags.CONCURRENT in self._flags

    def close(self) -> None:
        self._closing.set()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def run(self) -> None:
        try:
            self._sock.settimeout(HANDSHAKE_SECONDS)
            while (frames := self._receive()) is not None:
                for frame in frames:
                    self._handle(frame)
        except (OSError, ProtocolError) as error:
            if not self._closing.is_set():
                self._host.log(f"connection closed: {error}")
        finally:
            self._end()

    def _end(self) -> None:
        self.close()
        with self._lock:
            executions = list(self._execs.values())
            threads = list(self._threads)
        for execution in executions:
            execution.kill("the host is gone")
        if self._pty is not None:
            self._pty.kill()
        for thread in threads:
            thread.join()
        self._files.close()
        if self._pump is not None:
            self._pump.close()
        self._sock.close()

    def _receive(self) -> list[Frame] | None:
        data = self._sock.recv(_RECEIVE)
        return self._decoder.feed(data) if data else None

    def _send(self, kind: MessageType, request_id: int, body: bytes) -> None:
        frame = encode_message(kind, request_id, body)
        with self._send_lock:
            self._sock.sendall(frame)

    def _handle(self, frame: Frame) -> None:
        if frame.type == MessageType.PING:
            self._authenticate(frame.payload)
            return
        if self._flags is None:
            raise ProtocolError("not authenticated")
        kind = frame.known
        request_id, body = split_message(frame.payload)
        handler = None if kind is None else self._handlers().get(kind)
        if handler is None:
            self._host.log(f"frame of type {frame.type} skipped")
            return
        handler(request_id, body)

    def _handlers(self) -> dict[MessageType, Callable[[int, bytes], None]]:
        handlers: dict[MessageType, Callable[[int, bytes], None]] = {
            MessageType.EXEC_REQUEST: self._exec,
            MessageType.SUBSCRIBE_TELEMETRY: self._subscribe,
            MessageType.PTY_OPEN: self._open_pty,
            MessageType.SNAPSHOT_READY: self._snapshot_ready,
            MessageType.SHUTDOWN: self._shutdown,
        }
        handlers.update(self._files.handlers(self._flags or BASE_PROTOCOL))
        if self._concurrent:
            handlers[MessageType.SIGNAL] = self._signal
        if self._flags is not None and Flags.CONFIGURE in self._flags:
            handlers[MessageType.CONFIGURE] = self._configure
        if self._flags is not None and Flags.PORT_FORWARD in self._flags:
            handlers[MessageType.FORWARD_LISTEN] = self._listen
            for kind in (
                MessageType.FORWARD_DATA,
                MessageType.FORWARD_WINDOW,
                MessageType.FORWARD_CLOSE,
            ):
                handlers[kind] = self._stream_handler(kind)
        return handlers

    def _authenticate(self, payload: bytes) -> None:
        ping = decode_ping(payload)
        if not accepts(ping, self._host.secret):
            raise ProtocolError("handshake refused")
        self._flags = ping.flags & self._host.flags
        self._decoder.set_limit(MAX_PAYLOAD)
        self._sock.settimeout(None)
        with self._send_lock:
            offered = self._host.flags if ping.flags != BASE_PROTOCOL else BASE_PROTOCOL
            self._sock.sendall(encode_frame(MessageType.PONG, encode_pong(offered)))

    def _configure(self, request_id: int, body: bytes) -> None:
        answer = self._host.configure(decode_configure(body))
        self._send(MessageType.CONFIGURED, request_id, encode_configured(answer))

    def _refusal(self, program: str) -> str | None:
        told = self._flags is not None and Flags.CONFIGURE in self._flags
        return self._host.rules.refusal(program, told=told)

    # -- exec -----------------------------------------------------------------------------

    def _exec(self, request_id: int, body: bytes) -> None:
        request = decode_exec_request(body, raw=self._raw)
        refusal = self._refusal(request.program)
        if refusal is None and not self._host.exec_slots.acquire(blocking=False):
            refusal = f"{MAX_EXECS} programs are running already; wait for one to end"
        if refusal is not None:
            self._respond(request_id, ExecResponse(b"", b"", -1, refusal, 0))
            return
        done = os.eventfd(0, os.EFD_CLOEXEC)
        execution = Execution(
            request,
            self._host.place,
            self._host.children,
            self._host.identity,
            KEEP_BYTES if self._concurrent else KEEP_BYTES_BASE,
            CHUNK_BYTES_RAW if self._raw else CHUNK_BYTES,
        )
        with self._lock:
            if request_id in self._execs:
                self._host.exec_slots.release()
                os.close(done)
                raise ProtocolError(f"request id {request_id} is in use")
            self._execs[request_id] = execution
        concurrent = self._concurrent
        self._start_thread(
            f"exec-{request_id}",
            lambda: self._run_exec(request_id, execution, None if concurrent else done),
        )
        if concurrent:
            os.close(done)
        else:
            self._await_in_order(done, execution)

    def _await_in_order(self, done: int, execution: Execution) -> None:
        """Serve nothing else until the program has ended, but see the host leave."""
        poll = select.poll()
        poll.register(done, select.POLLIN)
        poll.register(self._sock, select.POLLRDHUP)
        try:
            while all(fd != done for fd, _ in poll.poll()):
                poll.unregister(self._sock)
                execution.kill("the host is gone")
        finally:
            os.close(done)

    def _run_exec(self, request_id: int, execution: Execution, done: int | None) -> None:
        def emit(chunk: ExecChunk) -> None:
            body = encode_exec_chunk(chunk, raw=self._raw)
            self._send(MessageType.EXEC_OUTPUT_CHUNK, request_id, body)

        try:
            response = execution.run(emit)
        finally:
            with self._lock:
                del self._execs[request_id]
            self._host.exec_slots.release()
        try:
            self._respond(request_id, response)
        except OSError:
            self.close()
        finally:
            if done is not None:
                os.eventfd_write(done, 1)

    def _respond(self, request_id: int, response: ExecResponse) -> None:
        body = encode_exec_response(response, raw=self._raw, extended=self._concurrent)
        self._send(MessageType.EXEC_RESPONSE, request_id, body)

    def _signal(self, request_id: int, body: bytes) -> None:
        number = decode_signal(body)
        with self._lock:
            execution = self._execs.get(request_id)
        if execution is not None:
            execution.signal(number)

    # -- telemetry ------------------------------------------------------------------------

    def _subscribe(self, request_id: int, body: bytes) -> None:
        subscription = decode_subscription(body)
        with self._lock:
            if any(thread.name == "telemetry" for thread in self._threads):
                raise ProtocolError("telemetry is already subscribed to")
        self._start_thread("telemetry", lambda: self._send_samples(request_id, subscription))

    def _send_samples(self, request_id: int, subscription: TelemetrySubscription) -> None:
        telemetry = Telemetry(self._host.telemetry_root)
        interval = max(MIN_INTERVAL_MS, subscription.interval_ms) / 1000
        kernel = subscription.include_kernel_threads
        while not self._closing.wait(min(interval, threading.TIMEOUT_MAX)):
            batch = telemetry.sample(include_kernel_threads=kernel)
            try:
                self._send(MessageType.TELEMETRY_DATA, request_id, encode_telemetry(batch))
            except OSError:
                return

    # -- PTY ------------------------------------------------------------------------------

    def _open_pty(self, request_id: int, body: bytes) -> None:
        request = decode_pty_open(body)
        error = self._refusal(request.program)
        if error is None and not self._host.pty_slots.acquire(blocking=False):
            error = f"max PTY sessions ({MAX_SESSIONS}) reached"
        if error is not None:
            self._opened(request_id, error)
            return
        try:
            host = self._host
            try:
                self._pty = PtySession(request, host.place, host.children, host.identity)
            except (OSError, ValueError) as reason:
                text = unstarted(host.place, request.program, request.working_dir, reason)
                self._opened(request_id, text)
                return

            def send(kind: MessageType, data: bytes) -> None:
                self._send(kind, request_id, data)

            try:
                self._opened(request_id, None)
            finally:
                self._pty.run(self._sock, self._receive, send)
        finally:
            self._host.pty_slots.release()

    def _opened(self, request_id: int, error: str | None) -> None:
        self._send(
            MessageType.PTY_OPENED, request_id, encode_outcome(Outcome(error is None, error))
        )

    # -- ports ----------------------------------------------------------------------------

    def _listen(self, request_id: int, body: bytes) -> None:
        port = decode_port(body)
        if self._pump is None:
            self._pump = StreamPump(self._send, "forward")
        try:
            answer = Listening(self._pump.listen(port))
        except OSError as error:
            answer = Listening(port, f"cannot listen on port {port}: {error.strerror}")
        self._send(MessageType.FORWARD_LISTENING, request_id, encode_listening(answer))

    def _stream_handler(self, kind: MessageType) -> Callable[[int, bytes], None]:
        def handle(number: int, body: bytes) -> None:
            if self._pump is not None:
                self._pump.handle(kind, number, body)

        return handle

    # -- the machine ----------------------------------------------------------------------

    def _snapshot_ready(self, request_id: int, body: bytes) -> None:
        self._send(MessageType.SNAPSHOT_READY, request_id, b"")

    def _shutdown(self, request_id: int, body: bytes) -> None:
        self._host.request_shutdown()

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        def run() -> None:
            try:
                target()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
