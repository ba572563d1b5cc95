"""virtiofsd, which serves one directory of the host to a machine in our place, by vhost-user.

It is started so that it has no more rights on the host than our own file system device has: as
whom a share acts there (`share_identity.py`), in a user namespace in which there is nobody else,
without capabilities outside of it; and in there it makes itself a mount namespace with nothing but
the directory. In the guest all files are the agent's, as they are with ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from voidbus.vm.descriptors import most_descriptors
from voidbus.vm.devices.event_loop import READ, EventLoop
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import GuestMemory, SharedRegion
from voidbus.vm.devices.share_identity import GUEST_GID, GUEST_UID
from voidbus.vm.devices.shared_directory import MountError
from voidbus.vm.devices.unix_listener import listen_unix
from voidbus.vm.devices.vhost_user_back_end import BackEnd
from voidbus.vm.devices.vhost_user_device import VhostUserDevice
from voidbus.vm.devices.virtio_fs import DEVICE_ID, QUEUE_SIZES, configuration
from voidbus.vm.helper_process import HelperProcess
from voidbus.vm.machine import Mount

_GRACE_SECONDS = 0.25
"""How long it may take to end with its machine. What it does not finish, its guest has not been
told of."""

_ALL_IDS = 0xFFFF_FFFF
"""How many ids a guest may have: all but the one that is none (-1)."""


class Virtiofsd:
    """One virtiofsd, its directory, and our end of its connection."""

    def __init__(
        self, program: Path, mount: Mount, owner: tuple[int, int], folder: Path, tag: str
    ) -> None:
        """Start it, to act as ``owner``, uid and gid; ``folder`` is where a socket may be made. It
        is not waited for. MountError where it can't be started."""
        self.directory = mount.host_path
        uid, gid = owner
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            with _connected(self.socket, folder / f"{tag}.vhost") as listener:
                options = _options(listener.fileno(), mount, uid, gid)
                command = [*_sealed(uid, gid), os.fspath(program), *options]
                self.process = HelperProcess(command, [listener.fileno()])
        except (OSError, ValueError) as error:
            self.socket.close()
            raise MountError(
                f"{self.directory} can't be shared: virtiofsd can't be started: {error}. It takes "
                "setpriv and unshare (of util-linux); or leave machines.virtiofsd unset."
            ) from error

    def ending(self) -> str:
        """How it has ended, its connection over; it is killed for this where it has not."""
        return f"virtiofsd, which served {self.directory}: {self.process.close()}"

    def close(self) -> None:
        """End it. Again is fine."""
        self.socket.close()
        self.process.close(_GRACE_SECONDS)


class VirtiofsdDevice(VhostUserDevice):
    """The directory as a device of a machine of ours."""

    device_id = DEVICE_ID

    def __init__(
        self,
        virtiofsd: Virtiofsd,
        tag: str,
        memory: GuestMemory,
        regions: Sequence[SharedRegion],
        *,
        patience: float,
    ) -> None:
        """``tag`` is what the guest mounts; ``virtiofsd`` is the caller's and outlives this, but
        its socket is this device's from now on. Waits for its greeting, ``patience`` seconds at
        most. Raises MountError, with what it said."""
        self._virtiofsd = virtiofsd
        try:
            super().__init__(
                configuration(tag),
                QUEUE_SIZES,
                BackEnd(virtiofsd.socket),
                memory,
                regions,
                ending=virtiofsd.ending,
                patience=patience,
            )
        except DeviceError as error:
            raise MountError(
                f"{virtiofsd.directory} can't be shared: {error}. It takes virtiofsd 1.13 or "
                "later, user namespaces, and a directory that its owner reaches; or leave "
                "machines.virtiofsd unset."
            ) from error

    def attach(self, loop: EventLoop) -> None:
        super().attach(loop)
        loop.watch(self._virtiofsd.process.stderr, READ, lambda _: self._read_stderr(loop))

    def _read_stderr(self, loop: EventLoop) -> None:
        # What it says at a guest's behest must not fill the pipe, nor anything else.
        if not self._virtiofsd.process.read_stderr():
            loop.unwatch(self._virtiofsd.process.stderr)


@contextlib.contextmanager
def _connected(client: socket.socket, path: Path) -> Iterator[socket.socket]:
    """A listening socket that ``client`` waits at and nobody else can. Raises OSError,
    ValueError."""
    with listen_unix(path, 1) as listener:
        try:
            client.connect(os.fspath(path))
        finally:
            path.unlink()
        listener.setblocking(True)
        yield listener


def _sealed(uid: int, gid: int) -> list[str]:
    """A command that runs one in a user namespace of its own, as these ids."""
    drop: list[str] = []
    if os.geteuid() == 0:
        # Who maps user 0 into a namespace must have that capability (user_namespaces(7)). It is
        # gone once the namespace is there.
        bounding = "-all,+setfcap" if uid == 0 else "-all"
        drop = ["--bounding-set", bounding, "--inh-caps", "-all"]
        drop += ["--reuid", str(uid), "--regid", str(gid), "--clear-groups"]
    return ["setpriv", "--no-new-privs", *drop, "unshare", "--user", "--map-current-user"]


def _options(listener: int, mount: Mount, uid: int, gid: int) -> list[str]:
    options = [
        *("--fd", str(listener)),
        *("--shared-dir", os.path.realpath(mount.host_path)),
        *("--sandbox", "namespace"),
        *("--log-level", "error"),
        "--inode-file-handles=never",  # they take a capability it does not have
        *("--rlimit-nofile", str(most_descriptors())),  # one for each file a guest knows
    ]
    for which, ours, guests in (("uid", uid, GUEST_UID), ("gid", gid, GUEST_GID)):
        options += [f"--translate-{which}", f"squash-guest:0:{ours}:{_ALL_IDS}"]
        options += [f"--translate-{which}", f"squash-host:0:{guests}:{_ALL_IDS}"]
    return options if mount.writable else [*options, "--readonly"]
