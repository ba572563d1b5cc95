"""Streams carried over a channel: programs in the guest reach one endpoint on the host.

The host asks the guest to listen (FORWARD_LISTEN). For each connection the guest picks a
stream id (with GUEST_STREAM_BIT) and sends FORWARD_OPEN; the host connects to the endpoint it
allows for that port. Then both sides send FORWARD_DATA, each no more than the other's window:
WINDOW bytes at first, and what FORWARD_WINDOW adds once bytes were really handed on. So
neither side ever holds more than WINDOW bytes of a stream. FORWARD_CLOSE 0 says the sender
sends no more, 1 that the stream is gone. A peer that breaks these rules loses the stream.

One thread serves all streams of a channel; the same code runs on both sides.
"""

from __future__ import annotations

import collections
import itertools
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from .frames import GUEST_STREAM_BIT, MessageType
from .port_messages import encode_port

WINDOW = 256 * 1024
MAX_STREAMS = 64
_CHUNK = 32 * 1024
_COUNT = struct.Struct("<I")

Send = Callable[[MessageType, int, bytes], None]


class _Stream:
    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self.pending = bytearray()  # from the peer, not yet taken by the socket
        self.credit = WINDOW  # bytes the peer still takes
        self.read_done = False
        self.peer_done = False
        self.shut = False


class _Command(NamedTuple):
    kind: str
    number: int
    data: bytes = b""
    sock: socket.socket | None = None


class StreamPump:
    """Moves bytes between local sockets and the channel. ``send`` puts one message on the
    channel; an OSError from it ends the pump. ``close`` joins the thread."""

    def __init__(self, send: Send, name: str) -> None:
        self._send = send
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._commands: collections.deque[_Command] = collections.deque()
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._listeners: list[socket.socket] = []
        self._arriving = 0  # sockets attached that the thread has not seen yet
        self._numbers = itertools.count(1)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def listen(self, port: int) -> int:
        """Listen on the guest's loopback; the port really used. Raises OSError."""
        listener = socket.create_server(("127.0.0.1", port), backlog=32)
        listener.setblocking(False)
        actual = int(listener.getsockname()[1])
        self._post(_Command("listen", actual, sock=listener))
        return actual

    def attach(self, number: int, sock: socket.socket) -> None:
        """Serve the stream the peer opened with a socket, which may still be connecting."""
        sock.setblocking(False)
        self._post(_Command("attach", number, sock=sock))

    @property
    def full(self) -> bool:
        """Whether one more stream would be refused: to be asked before a socket is made for it."""
        with self._lock:
            return self._arriving + len(self._streams) >= MAX_STREAMS

    def handle(self, kind: int, number: int, body: bytes) -> None:
        """Take a FORWARD_DATA, _WINDOW or _CLOSE from the peer. Never blocks."""
        names = {
            MessageType.FORWARD_DATA: "data",
            MessageType.FORWARD_WINDOW: "window",
            MessageType.FORWARD_CLOSE: "close",
        }
        self._post(_Command(names[MessageType(kind)], number, body))

    def close(self) -> None:
        with self._lock:
            already, self._closed = self._closed, True
            if not already:
                os.eventfd_write(self._wake, 1)  # under the lock: it is closed under it as well
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _post(self, command: _Command) -> None:
        with self._lock:
            if not self._closed:
                # Bounded by the caller: what a peer may send is bounded by its window, and one
                # that ignores it finds this thread faster than its channel.
                self._commands.append(command)
                self._arriving += command.kind == "attach"
                os.eventfd_write(self._wake, 1)
                return
        if command.sock is not None:
            command.sock.close()

    def _run(self) -> None:
        try:
            while not self._closed:
                for key, events in self._selector.select():
                    if key.data is None:
                        self._obey()
                    elif isinstance(key.data, _Stream):
                        self._serve(key.data, events)
                    else:
                        self._accept(key.data)
        except OSError:
            self._closed = True  # the channel is gone
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._closed = True
            left = [command.sock for command in self._commands if command.sock is not None]
            self._commands.clear()
            self._selector.close()
            os.close(self._wake)
        for sock in (*left, *self._listeners, *(s.sock for s in self._streams.values())):
            sock.close()

    def _obey(self) -> None:
        os.eventfd_read(self._wake)
        while self._commands:
            command = self._commands.popleft()
            if command.sock is not None:
                if command.kind == "listen":
                    self._listeners.append(command.sock)
                    self._selector.register(command.sock, selectors.EVENT_READ, command.sock)
                else:
                    self._begin(command.number, command.sock)
                    with self._lock:
                        self._arriving -= 1
                continue
            stream = self._streams.get(command.number)
            if stream is not None:
                self._take(stream, command)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if len(self._streams) >= MAX_STREAMS:
            sock.close()
            return
        sock.setblocking(False)
        number = GUEST_STREAM_BIT | next(self._numbers)
        self._send(MessageType.FORWARD_OPEN, number, encode_port(int(listener.getsockname()[1])))
        self._begin(number, sock)

    def _begin(self, number: int, sock: socket.socket) -> None:
        if number in self._streams or len(self._streams) >= MAX_STREAMS:
            sock.close()
            self._send(MessageType.FORWARD_CLOSE, number, b"\x01")
            return
        stream = self._streams[number] = _Stream(number, sock)
        self._selector.register(sock, selectors.EVENT_READ, stream)

    def _take(self, stream: _Stream, command: _Command) -> None:
        if command.kind == "data":
            stream.pending += command.data
            if len(stream.pending) > WINDOW or stream.peer_done:
                self._drop(stream, tell=True)
            else:
                self._write(stream)
        elif command.kind == "window":
            if len(command.data) != _COUNT.size:
                self._drop(stream, tell=True)
                return
            stream.credit = min(WINDOW, stream.credit + _COUNT.unpack(command.data)[0])
            self._watch(stream)
        elif command.data == b"\x00":
            stream.peer_done = True
            self._write(stream)
        else:
            self._drop(stream, tell=False)

    def _serve(self, stream: _Stream, events: int) -> None:
        # What came before it in this turn may have ended it, and given its number to another.
        if events & selectors.EVENT_WRITE and self._streams.get(stream.number) is stream:
            self._write(stream)
        if events & selectors.EVENT_READ and self._streams.get(stream.number) is stream:
            self._read(stream)

    def _read(self, stream: _Stream) -> None:
        try:
            data = stream.sock.recv(min(_CHUNK, stream.credit))
        except BlockingIOError:
            return
        except OSError:
            self._drop(stream, tell=True)
            return
        if data:
            stream.credit -= len(data)
            self._send(MessageType.FORWARD_DATA, stream.number, data)
        else:
            stream.read_done = True
            self._send(MessageType.FORWARD_CLOSE, stream.number, b"\x00")
        self._watch(stream)

    def _write(self, stream: _Stream) -> None:
        written = 0
        try:
            while stream.pending:
                count = stream.sock.send(stream.pending)
                del stream.pending[:count]
                written += count
            if stream.peer_done and not stream.shut:
                stream.sock.shutdown(socket.SHUT_WR)
                stream.shut = True
        except BlockingIOError:
            pass
        except OSError:
            self._drop(stream, tell=True)
            return
        if written:
            self._send(MessageType.FORWARD_WINDOW, stream.number, _COUNT.pack(written))
        self._watch(stream)

    def _watch(self, stream: _Stream) -> None:
        if stream.read_done and stream.shut:
            self._drop(stream, tell=False)
            return
        events = 0
        if stream.credit and not stream.read_done:
            events |= selectors.EVENT_READ
        if stream.pending:
            events |= selectors.EVENT_WRITE
        registered = stream.sock in self._selector.get_map()
        if events and registered:
            self._selector.modify(stream.sock, events, stream)
        elif events:
            self._selector.register(stream.sock, events, stream)
        elif registered:
            self._selector.unregister(stream.sock)

    def _drop(self, stream: _Stream, *, tell: bool) -> None:
        del self._streams[stream.number]
        if stream.sock in self._selector.get_map():
            self._selector.unregister(stream.sock)
        stream.sock.close()
        if tell:
            self._send(MessageType.FORWARD_CLOSE, stream.number, b"\x01")
