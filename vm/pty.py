"""The host's side of a terminal session, which has a connection to itself."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from voidbus.vm.connect import Connected
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.frames import (
    Frame,
    FrameDecoder,
    MessageType,
    ProtocolError,
    encode_message,
    split_message,
)
from voidbus.vm.guest.outcome import decode_outcome
from voidbus.vm.guest.pty_messages import (
    PtyOpen,
    decode_pty_closed,
    encode_pty_open,
    encode_pty_resize,
)
from voidbus.vm.sender import Sender

log = logging.getLogger(__name__)

_SESSION_ID = 1  # protocol, "PTY": request id 1 throughout
_DATA = 64 * 1024


@dataclass(frozen=True)
class PtyCall:
    """A program to run on a terminal of ``cols`` by ``rows`` characters."""

    program: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    working_dir: str | None = None
    cols: int = 80
    rows: int = 24
    interactive: bool = False


class PtyChannel:
    """One session. Callbacks run on its own thread; ``on_closed`` comes once, if it opened."""

    def __init__(
        self,
        connected: Connected,
        call: PtyCall,
        on_data: Callable[[bytes], None],
        on_closed: Callable[[int | ChannelFault], None],
        name: str,
    ) -> None:
        self._sock = connected.sock
        self._on_data = on_data
        self._on_closed = on_closed
        self._opened = threading.Event()
        self._refusal: ChannelFault | None = None
        self._closed_here = False
        self._close_lock = threading.Lock()
        self._released = False
        self._sender = Sender(self._sock, self._broken, f"{name}-send")
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()
        request = PtyOpen(
            call.cols,
            call.rows,
            call.program,
            call.args,
            call.env,
            call.working_dir,
            call.interactive,
        )
        self._put(MessageType.PTY_OPEN, encode_pty_open(request))

    @property
    def ended(self) -> bool:
        return not self._reader.is_alive() and self._released

    def wait_open(self, timeout: float) -> None:
        """Wait for the guest's answer. Raises ChannelFault, and is closed then."""
        if not self._opened.wait(timeout):
            self._refusal = ChannelFault(FaultReason.DEADLINE, "the terminal did not open in time")
        if self._refusal is not None:
            self.close(0)
            raise self._refusal

    def write(self, data: bytes) -> None:
        """Type into the terminal. Raises ChannelFault when the session is gone."""
        for start in range(0, len(data), _DATA):
            self._put(MessageType.PTY_DATA, data[start : start + _DATA])

    def resize(self, cols: int, rows: int) -> None:
        """Give the terminal another size. Raises ChannelFault when the session is gone."""
        self._put(MessageType.PTY_RESIZE, encode_pty_resize(cols, rows))

    def close(self, timeout: float) -> None:
        """End the session: asked, and after ``timeout`` seconds cut off. Joins its threads."""
        with contextlib.suppress(ChannelFault):
            self._put(MessageType.PTY_CLOSE, b"")
        if threading.current_thread() is self._reader:
            raise RuntimeError("a terminal can't be closed from its own callback")
        if timeout > 0:
            self._reader.join(timeout)
        self._closed_here = True
        self._shut()
        with self._close_lock:
            if self._released:
                return
            self._reader.join()
            self._sender.close()
            self._sock.close()
            self._released = True

    def _put(self, kind: MessageType, body: bytes) -> None:
        self._sender.put(encode_message(kind, _SESSION_ID, body))

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _broken(self, detail: str) -> None:
        self._shut()

    def _read(self) -> None:
        decoder = FrameDecoder()
        result: int | ChannelFault | None = None
        self._sock.setblocking(True)
        try:
            while result is None:
                data = self._sock.recv(_DATA)
                if not data:
                    reason = FaultReason.CLOSED if self._closed_here else FaultReason.LOST
                    result = ChannelFault(reason, "the terminal's connection ended")
                    break
                for frame in decoder.feed(data):
                    if result is None:
                        result = self._take(frame)
        except ProtocolError as error:
            result = ChannelFault(FaultReason.PROTOCOL, str(error))
        except OSError as error:
            result = ChannelFault(FaultReason.LOST, f"reading failed: {error}")
        self._shut()
        if not self._opened.is_set():
            self._refusal = result if isinstance(result, ChannelFault) else None
            self._opened.set()
        elif self._refusal is None and result is not None:
            try:
                self._on_closed(result)
            except Exception:
                log.exception("a terminal callback failed")

    def _take(self, frame: Frame) -> int | ChannelFault | None:
        body = split_message(frame.payload)[1]
        if frame.type == MessageType.PTY_OPENED and not self._opened.is_set():
            outcome = decode_outcome(body)
            if not outcome.success:
                text = outcome.error or "the guest did not open the terminal"
                return ChannelFault(FaultReason.REFUSED, text)
            self._opened.set()
        elif frame.type == MessageType.PTY_DATA and self._opened.is_set():
            try:
                self._on_data(body)
            except Exception:
                log.exception("a terminal callback failed")
        elif frame.type == MessageType.PTY_CLOSED and self._opened.is_set():
            return decode_pty_closed(body)
        else:
            raise ProtocolError(f"frame of type {frame.type} on a terminal's connection")
        return None
