"""A host directory offered to a virtual machine monitor as a virtio-fs device.

The monitor (QEMU: ``-device vhost-user-fs-device,chardev=...,tag=TAG,queue-size=1024``) connects to
a Unix socket of ours and hands over the guest's memory and queues; see docs/mounts.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.shared_directory import MountError, SharedDirectory
from voidbus.vm.devices.vhost_user import VhostUserBackend
from voidbus.vm.devices.virtio_fs import VirtioFs

__all__ = ["MountError", "VhostUserFs"]


class VhostUserFs:
    """One mount: its directory, its socket, and the one thread that serves both."""

    def __init__(
        self,
        vhost_path: Path,
        directory: Path,
        tag: str,
        *,
        writable: bool,
        name: str,
        on_failed: Callable[[str], None],
        limits: ShareLimits | None = None,
    ) -> None:
        """``tag`` is what the guest mounts, 36 bytes of UTF-8 at most (else ValueError); ``name``
        is for the thread and for messages. ``on_failed`` is called at most once, on this mount's
        thread, with the reason the device can't go on. ``limits`` are those of the only share of
        a process where nothing is said. The directory is opened here: MountError if it can't be
        shared."""
        self._share = SharedDirectory(directory, writable=writable, limits=limits)
        try:
            device = VirtioFs(self._share, tag)
            self._loop = EventLoop(name, on_failed)
        except BaseException:
            self._share.close()
            raise
        self._backend = VhostUserBackend(device, vhost_path, self._loop)
        self._listening = False

    def start(self) -> None:
        """Listen on ``vhost_path`` (mode 0600) and serve. Once. OSError or ValueError if there
        can't be such a socket; ``close`` is due all the same."""
        self._backend.listen()
        self._listening = True
        self._loop.start()

    def close(self) -> None:
        """End the thread, close every descriptor, remove the socket. Again is fine."""
        self._loop.close()
        if not self._listening:
            self._share.close()
