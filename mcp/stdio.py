"""void-mcp on standard input and output: one client, whose process started ours."""

import os
import select
import threading
import time
from typing import Any

from voidbus.mcp.framing import FrameDecoder, Unreadable, wrap
from voidbus.mcp.jsonrpc import INVALID_REQUEST, RpcError, decode, encode, error
from voidbus.mcp.link import Link, new_key
from voidbus.mcp.server import Session, Work
from voidbus.mcp.watch import Watch
from voidbus.sidecar.client import SidecarClient

WRITE_SECONDS = 30.0
"""How long a client may leave standard output unread before it is given up."""

LAST_WORK = 16.0
"""How long work may go on after the input has ended: as long as the sidecar's client waits."""

_JOIN = 5.0  # seconds for a worker to end once its work is cut

_PIECE = 4096  # a pipe that can be written to takes so much at once (PIPE_BUF, pipe(7))


class StdioServer:
    """Reads messages until the input ends; answers them as they are done, in any order."""

    def __init__(self, client: SidecarClient, *, fd_in: int = 0, fd_out: int = 1) -> None:
        self._in = fd_in
        self._out = fd_out
        self._watch = Watch(client)
        self._link = Link(Session(new_key), client, self._watch, self._send)
        self._writing = threading.Lock()
        self._has_header = False
        self._broken = False
        self._workers: set[threading.Thread] = set()

    def run(self) -> None:
        """Serve until the input ends or the output is broken. What else is raised (a signal's
        exception) ends it too, without waiting for work that is under way."""
        decoder = FrameDecoder()
        patience = 0.0
        try:
            while not self._broken and (data := os.read(self._in, 65536)):
                self._take(decoder.feed(data))
            self._take(decoder.end())
            patience = 0.0 if self._broken else LAST_WORK
        finally:
            self._close(patience)

    def _take(self, frames: list[Any]) -> None:
        for frame in frames:
            self._has_header = frame.has_header
            if isinstance(frame, Unreadable):
                self._send(error(None, RpcError(INVALID_REQUEST, f"Invalid request: {frame.why}")))
                continue
            for message in decode(frame.data).messages:
                answers, works = self._link.receive(message)
                for body in answers:
                    self._send(body)
                for work in works:
                    self._start(work)

    def _start(self, work: Work) -> None:
        # The session's own bound on work under way is the bound on these threads.
        worker = threading.Thread(target=self._perform, args=(work,), daemon=True)
        self._workers = {each for each in self._workers if each.is_alive()}
        try:
            worker.start()
        except RuntimeError:  # the guest gives us no thread more: then one after the other
            self._perform(work)
        else:
            self._workers.add(worker)

    def _perform(self, work: Work) -> None:
        for body in self._link.perform(work):
            self._send(body)

    def _send(self, body: dict[str, Any]) -> None:
        data = memoryview(wrap(encode(body), has_header=self._has_header))
        ready = select.poll()
        ready.register(self._out, select.POLLOUT)
        with self._writing:
            deadline = time.monotonic() + WRITE_SECONDS
            try:
                while data and not self._broken:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0 or not ready.poll(remaining * 1000):
                        raise TimeoutError
                    data = data[os.write(self._out, data[:_PIECE]) :]
            except OSError:  # the client has gone, or has stopped reading
                self._broken = True

    def _close(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        for body in self._link.close():
            self._send(body)
        self._watch.close()
        for worker in self._workers:
            worker.join(_JOIN)
