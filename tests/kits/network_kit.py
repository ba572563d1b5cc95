"""A guest's card spoken by hand, and networks made for a test alone."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from voidbus.vm.network.addresses import ADDRESS, GATEWAY, GATEWAY_MAC, MAC
from voidbus.vm.network.packets import checksum

GUEST_MAC = bytes.fromhex(MAC.replace(":", ""))
HOST_MAC = bytes.fromhex(GATEWAY_MAC.replace(":", ""))
FIN, SYN, RST, ACK = 1, 2, 4, 16


def ethernet(
    payload: bytes, *, to: bytes = HOST_MAC, by: bytes = GUEST_MAC, kind: int = 0x800
) -> bytes:
    return to + by + struct.pack(">H", kind) + payload


def ipv4(
    payload: bytes,
    to: str,
    protocol: int,
    *,
    by: str = str(ADDRESS),
    fragment: int = 0,
    total: int | None = None,
    options: bytes = b"",
) -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        0,
        20 + len(options) + len(payload) if total is None else total,
        1,
        fragment,
        64,
        protocol,
        0,
        socket.inet_aton(by),
        socket.inet_aton(to),
    )
    header += options
    return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + payload


def tcp(
    to: str,
    port: int,
    flags: int = SYN,
    *,
    by: str = str(ADDRESS),
    by_port: int = 40000,
    number: int = 1000,
    acknowledged: int = 0,
    data: bytes = b"",
    options: bytes = b"",
) -> bytes:
    """A frame with a segment of the guest. ``options`` are a multiple of 4 bytes."""
    offset = 5 + len(options) // 4
    segment = struct.pack(
        ">HHIIBBHHH",
        by_port,
        port,
        number & 0xFFFFFFFF,
        acknowledged,
        offset << 4,
        flags,
        65535,
        0,
        0,
    )
    segment += options + data
    pseudo = socket.inet_aton(by) + socket.inet_aton(to) + struct.pack(">HH", 6, len(segment))
    segment = segment[:16] + struct.pack(">H", checksum(pseudo + segment)) + segment[18:]
    return ethernet(ipv4(segment, to, 6, by=by))


def udp(to: str, port: int, data: bytes = b"?", *, by_port: int = 40000) -> bytes:
    header = struct.pack(">HHHH", by_port, port, 8 + len(data), 0)
    return ethernet(ipv4(header + data, to, 17))


def echo(to: str, number: int = 7, data: bytes = b"ping") -> bytes:
    body = struct.pack(">HH", number, 1) + data
    return ethernet(ipv4(struct.pack(">BBH", 8, 0, checksum(b"\x08\0\0\0" + body)) + body, to, 1))


def arp(address: str = str(GATEWAY)) -> bytes:
    return ethernet(
        struct.pack(">HHBBH", 1, 0x800, 6, 4, 1)
        + GUEST_MAC
        + ADDRESS.packed
        + bytes(6)
        + socket.inet_aton(address),
        to=b"\xff" * 6,
        kind=0x806,
    )


@dataclass(frozen=True)
class Segment:
    """What a frame to the guest says, its checksums found right."""

    by: str
    by_port: int
    port: int
    number: int
    acknowledged: int
    flags: int
    data: bytes

    @classmethod
    def parse(cls, frame: bytes) -> Self:
        assert frame[:14] == GUEST_MAC + HOST_MAC + b"\x08\x00"
        packet = frame[14:]
        assert checksum(packet[:20]) == 0
        assert packet[9] == 6
        segment = packet[20:]
        pseudo = packet[12:20] + struct.pack(">HH", 6, len(segment))
        assert checksum(pseudo + segment) == 0
        by_port, port, number, acknowledged, offset, flags = struct.unpack_from(">HHIIBB", segment)
        data = segment[(offset >> 4) * 4 :]
        by = socket.inet_ntoa(packet[12:16])
        return cls(by, by_port, port, number, acknowledged, flags, data)


class Card:
    """The machine's end of a network."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))

    def receive(self) -> bytes:
        (size,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(size)

    def segment(self) -> Segment:
        return Segment.parse(self.receive())

    def ask(self, frame: bytes) -> Segment:
        self.send(frame)
        return self.segment()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "the network closed the connection"
            data += more
        return data


CLONE_NEWNET = 0x40000000
"""Of clone(2) and setns(2)."""

_libc = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def network_namespace() -> Iterator[int]:
    """A new network namespace, as a descriptor, with its loopback up. This thread, and what it
    starts, is in it for the time of the context. Needs root."""
    before = _own_namespace()
    try:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        inside = _own_namespace()
        try:
            ip("link set lo up")
            yield inside
        finally:
            os.close(inside)
            _enter(before)
    finally:
        os.close(before)


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """This thread is in that namespace for the time of the context."""
    before = _own_namespace()
    try:
        _enter(namespace)
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)


def ip(arguments: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *arguments.split()], check=True, timeout=10, capture_output=True)


HOST_ADDRESS = "198.51.100.1"
OUTSIDE_ADDRESS = "198.51.100.2"
"""Of TEST-NET-2 (RFC 5737), on a cable between the two namespaces of ``host_and_outside``."""


@contextmanager
def host_and_outside() -> Iterator[int]:
    """This thread is on a host of its own, with a cable to the namespace given."""
    with network_namespace():
        host = _own_namespace()
        try:
            with network_namespace() as outside:
                path = f"/proc/{os.getpid()}/fd/{host}"
                ip(f"link add cable type veth peer name cable netns {path}")
                ip(f"addr add {OUTSIDE_ADDRESS}/24 dev cable")
                ip("link set cable up")
                with entered(host):
                    ip(f"addr add {HOST_ADDRESS}/24 dev cable")
                    ip("link set cable up")
                    yield outside
        finally:
            os.close(host)
