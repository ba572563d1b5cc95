"""A socket device for one QEMU machine: the device, its sockets, and the vhost-user back end."""

from __future__ import annotations

import dataclasses
import functools
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.unix_listener import check_path
from voidbus.vm.devices.vhost_user import VhostUserBackend
from voidbus.vm.devices.vsock import VsockDevice
from voidbus.vm.devices.vsock_packets import WRAP
from voidbus.vm.devices.vsock_sockets import HostSockets, open_host_port
from voidbus.vm.devices.vsock_stats import VsockStats


class VhostUserVsock:
    """A virtio socket device, served to QEMU at ``vhost_path`` and to programs of the host at
    ``sockets_path``, by the convention of Firecracker and Cloud Hypervisor: a client of
    ``sockets_path`` sends ``CONNECT <port>\\n`` and is answered ``OK <host port>\\n``; a
    connection of the guest to CID 2, port P, goes to the Unix socket ``<sockets_path>_P``.

    ``on_failed`` is called once, on the device's thread, when the guest or QEMU broke the rules;
    never once ``close`` has returned. It must be quick and must not call this object. QEMU going
    away is not a failure: its connections end, and another may come.
    """

    def __init__(
        self,
        vhost_path: Path,
        sockets_path: Path,
        guest_cid: int,
        *,
        name: str,
        on_failed: Callable[[str], None],
    ) -> None:
        """``guest_cid`` is 3 or more. Raises ValueError (a CID or path that can't be)."""
        check_path(vhost_path)
        self._name = name
        self._device = VsockDevice(guest_cid, functools.partial(open_host_port, sockets_path))
        self._sockets = HostSockets(sockets_path, self._device.connect)
        self._vhost_path = vhost_path
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._loop: EventLoop | None = None
        self._closed = False

    def start(self) -> None:
        """Bind both sockets (mode 0600) and start the thread. Once. Raises OSError, and
        ConnectionError after ``close``."""
        with self._lock:
            if self._closed or self._loop is not None:
                raise ConnectionError(f"{self._name}: the socket device was started or closed")
            loop = EventLoop(f"{self._name}-vsock", self._on_failed)
            try:
                VhostUserBackend(self._device, self._vhost_path, loop).listen()
                self._sockets.listen(loop)
                loop.start()
            except BaseException:
                loop.close()
                raise
            self._loop = loop

    def connect(self, port: int) -> socket.socket:
        """A stream to a port of the guest, returned at once, in blocking mode. If the guest
        refuses, or does not answer in CONNECT_SECONDS, it ends (end of file, or a reset).
        Closing it before the guest has accepted gives the connection up, sent data with it.

        Raises ConnectionError if the device is not running, ValueError for no port number.
        """
        if not 0 <= port <= WRAP:
            raise ValueError(f"no port: {port}")
        loop = self._loop
        ours, theirs = socket.socketpair()
        if loop is None or not loop.call(functools.partial(self._device.connect, port, theirs)):
            ours.close()
            theirs.close()
            raise ConnectionError(f"{self._name}: the socket device is not running")
        return ours

    @property
    def stats(self) -> VsockStats:
        """A copy of the counters."""
        return dataclasses.replace(self._device.stats)

    def close(self) -> None:
        """End all connections, join the thread and unlink both sockets. Again is fine."""
        with self._lock:
            self._closed = True
            if self._loop is not None:
                self._loop.close()
