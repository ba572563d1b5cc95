"""Gives the machine its addresses, as the host says: no DHCP, no waiting for a card.

By the ioctls of netdevice(7) and route's SIOCADDRT, all on a plain IPv4 socket.
"""

from __future__ import annotations

import fcntl
import socket
import struct

from .boot_line import NetworkSettings

INTERFACE = "eth0"

_SIOCADDRT = 0x890B  # <linux/sockios.h>, as all of these
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_IFF_UP = 1  # <linux/if.h>
_RTF_UP = 1  # <linux/route.h>
_RTF_GATEWAY = 2

_IFREQ = 40  # size of struct ifreq on 64-bit machines
_ADDRESS = struct.Struct("=HH4s8x")  # struct sockaddr_in


def bring_up(interface: str) -> None:
    """Switch an interface on. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _bring_up(control, interface)


def set_up(settings: NetworkSettings, interface: str = INTERFACE) -> None:
    """Give an interface its address and the machine its default route. Raises OSError; ENODEV
    when there is no such interface."""
    mask = (0xFFFFFFFF << (32 - settings.prefix)) & 0xFFFFFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _request(control, _SIOCSIFADDR, interface, _address(settings.address))
        _request(control, _SIOCSIFNETMASK, interface, _packed(struct.pack("!I", mask)))
        _bring_up(control, interface)
        fcntl.ioctl(control, _SIOCADDRT, default_route(settings.gateway))


def default_route(gateway: str) -> bytes:
    """The kernel's ``struct rtentry`` (<linux/route.h>, 64 bits) of a default route."""
    anywhere = _packed(bytes(4))
    flags = _RTF_UP | _RTF_GATEWAY
    head = struct.pack("=Q16s16s16sHh", 0, anywhere, _address(gateway), anywhere, flags, 0)
    return head + bytes(120 - len(head))


def resolver_file(settings: NetworkSettings) -> str:
    """The content of resolv.conf(5)."""
    return "".join(f"nameserver {server}\n" for server in settings.dns)


def _bring_up(control: socket.socket, interface: str) -> None:
    answer = _request(control, _SIOCGIFFLAGS, interface, b"")
    flags = struct.unpack_from("=H", answer, 16)[0]
    _request(control, _SIOCSIFFLAGS, interface, struct.pack("=H", flags | _IFF_UP))


def _request(control: socket.socket, number: int, interface: str, value: bytes) -> bytes:
    text = struct.pack("16s", interface.encode()) + value
    return fcntl.ioctl(control, number, text.ljust(_IFREQ, b"\0"))


def _address(text: str) -> bytes:
    return _packed(socket.inet_pton(socket.AF_INET, text))


def _packed(address: bytes) -> bytes:
    return _ADDRESS.pack(socket.AF_INET, 0, address)
