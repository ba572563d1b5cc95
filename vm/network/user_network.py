"""A network card for a guest that needs no rights on the host: passt behind a frame filter.

    machine <-- frames on a Unix socket --> filter (a thread here) <-- frames --> passt

passt would let a guest reach whatever a program on the host can. The filter in front of it decides
what it is asked for at all (``vm/network/frame_filter.py``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.machine import Lease
from voidbus.vm.network.addresses import ADDRESS, DNS, GATEWAY, MAC, MTU, PREFIX
from voidbus.vm.network.frame_filter import FrameFilter
from voidbus.vm.network.frame_port import FrameError, FramePort
from voidbus.vm.network.passt import Passt, PasstError
from voidbus.vm.network.relay import Relay
from voidbus.vm.network.routes import Routes
from voidbus.vm.network.rules import NetworkRules

__all__ = [
    "ADDRESS",
    "DNS",
    "GATEWAY",
    "MAC",
    "MTU",
    "PREFIX",
    "NetworkError",
    "NetworkRules",
    "NetworkStats",
    "UserNetwork",
    "available",
]

SOCKET_NAME = "network.sock"
"""The socket's name in the folder."""

_PATH_BYTES = 107
"""The longest path of a Unix socket (unix(7)): 108 bytes with the final zero."""

_PASST_ENDED = "passt has ended"

_TRY_SECONDS = 3.0
"""How long ``available`` waits for passt."""


class NetworkError(Exception):
    """A guest's network could not be started: what happened, and what to do about it."""


@dataclass(frozen=True)
class NetworkStats:
    """What went through since the start: frames and bytes by direction as the guest sees it."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    answered: int = 0
    """Frames that were not passed on but answered by the filter: refusals, ARP, echo requests to
    the gateway."""
    dropped: int = 0
    """Frames that were dropped without an answer: malformed, spoofed, of another protocol, over a
    limit."""


def available() -> str | None:
    """None where a ``UserNetwork`` can start, else why not and the command that mends it. Starts
    and ends passt once, so it takes some milliseconds."""
    try:
        Passt(_TRY_SECONDS).close()
        Routes().close()
    except PasstError as error:
        return str(error)
    except OSError as error:
        return f"the kernel can't be asked for routes: {error}; allow AF_NETLINK sockets"
    return None


class UserNetwork:
    """One guest's network. The machine connects to ``socket_path`` and sends and receives
    Ethernet frames, each after its length (4 bytes, big endian), as QEMU's ``-netdev stream``
    does. The guest's card must have the hardware address ``MAC``; the guest sets ``ADDRESS``,
    ``PREFIX``, ``GATEWAY`` and ``DNS`` itself.

    ``on_failed`` is called at most once, on the network's thread, when the network can't go on
    (passt has ended; the machine's bytes are not frames), with the reason; not when the machine
    closes its connection or ``close`` is called. ``on_lease`` is called by ``start``. Both must be
    quick, and must not call the network.
    """

    def __init__(
        self,
        folder: Path,
        rules: NetworkRules,
        *,
        name: str,
        on_failed: Callable[[str], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        self.socket_path = folder / SOCKET_NAME
        """Where the machine connects: listening from ``start`` on, mode 0600, for one client."""
        self._name = name
        self._on_failed = on_failed
        self._on_lease = on_lease
        self._lock = threading.Lock()
        self._started = False
        self._closed = False
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._relay: Relay | None = None
        self._routes: Routes | None = None
        self._filter = FrameFilter(rules, self._leads_out)

    def start(self, timeout: float) -> None:
        """Start passt and the filter, within ``timeout`` seconds. Once only.

        Raises NetworkError, with the command that mends it where there is one.
        """
        with self._lock:
            if self._started or self._closed:
                raise NetworkError(f"network {self._name}: started or closed already")
            self._started = True
            with contextlib.ExitStack() as undo:
                try:
                    self._start(timeout, undo)
                except PasstError as error:
                    raise NetworkError(f"network {self._name}: {error}") from error
                except OSError as error:
                    raise NetworkError(
                        f"network {self._name}: {error}; check the folder {self.socket_path.parent}"
                    ) from error
                undo.pop_all()

    def _start(self, timeout: float, undo: contextlib.ExitStack) -> None:
        listener = self._listen()
        undo.callback(self.socket_path.unlink, missing_ok=True)
        undo.callback(listener.close)
        self._routes = Routes()
        undo.callback(self._routes.close)
        passt = Passt(timeout)
        undo.callback(passt.close)
        self._on_lease(passt.process.lease)
        self._filter.window = passt.send_buffer // 2
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        undo.callback(os.close, self._wake)
        self._thread = threading.Thread(
            target=self._run, args=(listener, passt), name=f"{self._name}-network", daemon=True
        )
        self._thread.start()

    def allow_host_port(self, port: int) -> None:
        """Offer TCP ``port`` of the host's 127.0.0.1 at 10.0.2.2, from now on. Any thread may
        call this. Raises ValueError for what is not a port."""
        if not 0 < port < 65536:
            raise ValueError(f"{port} is not a TCP port")
        self._filter.allow_host_port(port)

    @property
    def stats(self) -> NetworkStats:
        """What went through so far; from any thread."""
        relay = self._relay
        if relay is None:
            return NetworkStats()
        return NetworkStats(
            relay.sent_frames,
            relay.sent_bytes,
            relay.received_frames,
            relay.received_bytes,
            relay.answered,
            relay.dropped,
        )

    def close(self) -> None:
        """End passt, the filter's thread and the socket, and wait for them. Again is fine."""
        with self._lock:
            self._closed = True
            if self._thread is None:
                return
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
            self._thread.join()
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    def _listen(self) -> socket.socket:
        path = self.socket_path
        if len(os.fsencode(path)) > _PATH_BYTES:
            raise NetworkError(
                f"network {self._name}: {path} is longer than the {_PATH_BYTES} bytes a socket's "
                "path may have; use a folder with a shorter path"
            )
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            path.chmod(0o600)  # before it listens, so that nobody else is in the queue
            listener.listen(1)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    # -- the network's thread ---------------------------------------------------------------

    def _leads_out(self, address: bytes) -> bool:
        routes = self._routes
        return routes is not None and routes.lead_out(address)

    def _run(self, listener: socket.socket, passt: Passt) -> None:
        failure = None
        try:
            guest = self._accept(listener, passt)
            listener.close()
            if guest is not None:
                try:
                    failure = self._forward(FramePort(guest), passt)
                finally:
                    guest.close()
        except (FrameError, OSError) as error:
            failure = f"the machine's end: {error}"
        except _PasstEnded:
            failure = _PASST_ENDED
        except Exception as error:  # noqa: BLE001 - whatever it is ends this network, with a reason
            failure = f"the filter failed: {error!r}"
        finally:
            listener.close()
            ending = passt.close()
            if self._routes is not None:
                self._routes.close()
            with contextlib.suppress(OSError):
                self.socket_path.unlink(missing_ok=True)
        if failure is not None and not self._closed:
            self._on_failed(f"network {self._name}: {failure} (passt: {ending})")

    def _accept(self, listener: socket.socket, passt: Passt) -> socket.socket | None:
        """The machine's connection; None when the network is closed before. Raises
        _PasstEnded."""
        poll = _poll_passt(passt, self._wake)
        poll.register(listener, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            _check_passt(passt, ready, poll)
            if self._wake in ready:
                return None
            if listener.fileno() in ready:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    return listener.accept()[0]

    def _forward(self, guest: FramePort, passt: Passt) -> str | None:
        """Move frames until the machine closes its connection or the network is closed. Raises
        FrameError and _PasstEnded."""
        outside = FramePort(passt.socket)
        relay = self._relay = Relay(guest, outside, self._filter)
        poll = _poll_passt(passt, self._wake)
        guest_fd, outside_fd = guest.socket.fileno(), outside.socket.fileno()
        while True:
            poll.register(guest_fd, _events(relay.reads_guest, guest))
            poll.register(outside_fd, _events(relay.reads_passt, outside))
            ready = dict(poll.poll())
            _check_passt(passt, ready, poll)
            if self._wake in ready:
                return None
            if not _received(ready.get(guest_fd, 0), relay.reads_guest, relay.from_guest):
                return None
            if not _received(ready.get(outside_fd, 0), relay.reads_passt, relay.from_passt):
                return _PASST_ENDED
            if not guest.flush():
                return None
            if not outside.flush():
                return _PASST_ENDED


class _PasstEnded(Exception):
    """passt is gone."""


_GONE = select.POLLHUP | select.POLLERR


def _received(ready: int, reads: bool, receive: Callable[[], bool]) -> bool:
    """Receive if there is something, and room for it. False when the other end is gone: then
    what it sent last is of no use either, and waiting for room would be a spin."""
    if ready & _GONE:
        return False
    return not (ready & select.POLLIN and reads) or receive()


def _events(reads: bool, port: FramePort) -> int:
    return (select.POLLIN if reads else 0) | (select.POLLOUT if port.waiting else 0)


def _poll_passt(passt: Passt, wake: int) -> select.poll:
    poll = select.poll()
    for fd in (wake, passt.process.pidfd, passt.process.stderr):
        poll.register(fd, select.POLLIN)
    return poll


def _check_passt(passt: Passt, ready: dict[int, int], poll: select.poll) -> None:
    if passt.process.stderr in ready and not passt.process.read_stderr():
        poll.unregister(passt.process.stderr)
    if passt.process.pidfd in ready:
        raise _PasstEnded
