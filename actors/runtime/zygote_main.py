"""The zygote process: it imports what runs need, then forks one process for each request.

`python -P -m voidbus.actors.runtime.zygote_main SOCKET_FD [MODULE ...]`; see `zygote` for the
owner's side. It has one thread, always: a fork copies only the calling thread, and locks the
others held stay locked in the child. It ends when its owner closes the socket, and the processes
it forked live on.

Packets, JSON with descriptors beside them (SOCK_SEQPACKET keeps their borders):
  to the zygote   {"id": n}                                  config, gate, log descriptors
  from it         {"ready": {"failed": {module: error}}}
                  {"id": n, "pid": p, "start_time": t}       the pidfd
                  {"id": n, "error": text}
                  {"exit": {"pid": p, "start_time": t, "returncode": r}}
The zygote opens the pidfd itself, before it can come to reap the child, so the pid can't have
been recycled.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from voidbus.actors.runtime.process import stat_of
from voidbus.actors.runtime.process_entry import reset_signals, run_and_exit

MAX_PACKET = 16 * 1024
REQUEST_FDS = 3
_OUTBOX_LIMIT = 256  # packets; with more unsent, no new request is read


def main(arguments: Sequence[str]) -> int:
    """Serve the socket until its owner closes it."""
    control = socket.socket(fileno=int(arguments[0]))
    control.setblocking(False)
    reset_signals()
    failed = _preload(arguments[1:])
    for reason in _unsafe_to_fork():
        failed["(fork)"] = reason
    gc.collect()
    gc.freeze()  # the collector then never writes to the pages shared with the children
    gc.disable()
    _ZygoteLoop(control).serve(failed)
    return 0


def _preload(modules: Sequence[str]) -> dict[str, str]:
    failed = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - any module may fail in any way; it is reported
            failed[module] = f"{type(error).__name__}: {error}"
    return failed


def _unsafe_to_fork() -> list[str]:
    reasons = []
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - before each fork; must be quick
    if threads != 1:
        reasons.append(f"a preloaded module started {threads - 1} threads")
    zmq = sys.modules.get("zmq")
    if zmq is not None and getattr(zmq.Context, "_instance", None) is not None:
        reasons.append("a preloaded module made a ZeroMQ context, which must not cross a fork")
    return reasons


class _ZygoteLoop:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}  # pid to start time
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self, failed: dict[str, str]) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written
        self._send({"ready": {"failed": failed}})
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        while True:
            events = select.POLLIN if len(self._outbox) < _OUTBOX_LIMIT else 0
            poller.register(self._control, events | (select.POLLOUT if self._outbox else 0))
            ready = dict(poller.poll())
            if self._wake_read in ready:
                self._reap()
            try:
                if not self._handle(ready.get(self._control.fileno(), 0)):
                    return
            except (BrokenPipeError, ConnectionResetError):
                return

    def _handle(self, events: int) -> bool:
        """Serve the socket; False once its owner has closed it."""
        if events & select.POLLOUT:
            self._flush()
        if events & select.POLLIN:
            packet, fds, _, _ = socket.recv_fds(
                self._control, MAX_PACKET, REQUEST_FDS, socket.MSG_CMSG_CLOEXEC
            )
            if not packet:
                return False
            self._spawn(json.loads(packet)["id"], fds)
        return not events & (select.POLLHUP | select.POLLERR) or bool(events & select.POLLIN)

    def _spawn(self, number: int, fds: list[int]) -> None:
        try:
            reasons = _unsafe_to_fork()
            if reasons or len(fds) != REQUEST_FDS:
                error = "; ".join(reasons) or "the descriptors did not all arrive"
                self._send({"id": number, "error": error})
                return
            pid = os.fork()
            if pid == 0:
                _become_child(*fds)
            start_time = stat_of(pid).start_time
            self._children[pid] = start_time
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            self._send({"id": number, "error": str(error)})
            return
        finally:
            for fd in fds:
                os.close(fd)
        self._send({"id": number, "pid": pid, "start_time": start_time}, [pidfd])

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            ended = {
                "pid": pid,
                "start_time": self._children.pop(pid),
                "returncode": os.waitstatus_to_exitcode(status),
            }
            self._send({"exit": ended})

    def _send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        self._outbox.append((json.dumps(message).encode(), fds or []))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen when read
            self._flush()

    def _flush(self) -> None:
        while self._outbox:
            packet, fds = self._outbox[0]
            try:
                socket.send_fds(self._control, [packet], fds)
            except BlockingIOError:
                return
            self._outbox.popleft()
            for fd in fds:
                os.close(fd)


def _become_child(config_fd: int, gate_fd: int, log_fd: int) -> NoReturn:
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for standard in (1, 2):
            os.dup2(log_fd, standard)
        low, high = sorted((config_fd, gate_fd))
        os.closerange(3, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
        gc.enable()
        run_and_exit(config_fd, gate_fd)
    finally:
        os._exit(71)  # EX_OSERR of sysexits.h: the steps above failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
