"""The process that does the networking: passt, sandboxed by itself, with a socket pair to us.

Why passt: it is a separate process without rights of any kind (user, mount, IPC and UTS namespaces
of its own, an empty root, seccomp, user nobody when it was started by root), it works for ordinary
users, and it ends when its socket closes, so it never outlives the process that started it.
libslirp would do its work inside our process, or in one whose sandbox we would have to write.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import time

from voidbus.vm.helper_process import HelperProcess, readable
from voidbus.vm.network.addresses import ADDRESS, DNS, GATEWAY, GATEWAY_MAC, MTU, PREFIX
from voidbus.vm.network.frame_port import framed
from voidbus.vm.network.packets import MAC_BYTES

INSTALL = "apt install passt"
"""What installs passt on Debian and Ubuntu."""

OPEN_FILES = 8192
"""Sockets passt may have: those of ``UDP_PORTS``, TCP connections and its reserve."""

SEND_BUFFER = 2 * 1024 * 1024
"""What is asked of the socket passt sends on; others than root get net.core.wmem_max at most
(socket(7))."""

_SO_SNDBUFFORCE = 32
"""<asm-generic/socket.h>; the socket module does not have it."""

_SHELL = f'ulimit -n {OPEN_FILES} 2>/dev/null; exec "$0" "$@"'

_ARP_FOR_GATEWAY = framed(
    b"\xff" * 6
    + MAC_BYTES
    + b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01"
    + MAC_BYTES
    + ADDRESS.packed
    + bytes(6)
    + GATEWAY.packed
)


class PasstError(Exception):
    """passt is not there, or did not start: why, and what to do about it."""


def find_passt() -> str:
    """The path of passt. Raises PasstError."""
    found = shutil.which("passt")
    if found is None:
        raise PasstError(f"passt is not installed; install it: {INSTALL}")
    return found


class Passt:
    """A running passt and our end of the socket pair to it."""

    def __init__(self, timeout: float) -> None:
        """Start passt, and wait until it answers, ``timeout`` seconds at most. Raises
        PasstError."""
        deadline = time.monotonic() + timeout
        program = find_passt()
        self.socket, theirs = socket.socketpair()
        self.send_buffer = _enlarge(theirs)
        """Bytes on their way to us that the socket holds; what is more, passt loses."""
        try:
            self.process = HelperProcess(
                ["/bin/sh", "-c", _SHELL, program, *_options(theirs.fileno())],
                [theirs.fileno()],
                noise=_NOISE,
            )
        except OSError as error:
            self.socket.close()
            raise PasstError(f"passt could not be started: {error}; check {program}") from error
        finally:
            theirs.close()
        try:
            self._wait_for_answer(deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> str:
        """End passt, by closing the socket and else by killing it, and tell how it ended. Again
        is fine."""
        self.socket.close()
        return self.process.close()

    def _wait_for_answer(self, deadline: float) -> None:
        # Sent before passt runs; answered as soon as it handles frames. It also tells passt the
        # guest's hardware address.
        with contextlib.suppress(ConnectionError):  # it ended at once: seen below
            self.socket.send(_ARP_FOR_GATEWAY, socket.MSG_NOSIGNAL)
        left = max(0.0, deadline - time.monotonic())
        if not readable(self.socket.fileno(), left):
            raise PasstError(f"passt did not answer in time; {self.close()}")
        try:
            answer = self.socket.recv(struct.calcsize(">I") + 42, socket.MSG_WAITALL)
        except ConnectionError:
            answer = b""
        if not answer:
            raise PasstError(
                f"passt ended while it started: {self.close()}; "
                "try `passt --foreground` by hand, and see whether user namespaces are allowed"
            )


_NOISE = ("Failed to send", "Don't run as root")


def _options(fd: int) -> list[str]:
    return [
        "--foreground",
        "--quiet",
        "--ipv4-only",
        f"--fd={fd}",  # ends when the socket is closed
        # Where the address and the route would be taken from if we did not give them: an
        # interface that every host has. Without it passt wants a default route.
        "--interface=lo",
        f"--address={ADDRESS}",
        f"--netmask={PREFIX}",
        f"--gateway={GATEWAY}",  # stands for the host's 127.0.0.1
        f"--mac-addr={GATEWAY_MAC}",
        f"--dns-forward={DNS}",
        f"--mtu={MTU}",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ndp",
        "--no-ra",
        "--tcp-ports=none",
        "--udp-ports=none",
    ]


def _enlarge(sock: socket.socket) -> int:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
