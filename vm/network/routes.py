"""Which addresses lie outside this host, as its kernel would route them."""

from __future__ import annotations

import socket
import struct

# linux/rtnetlink.h and linux/netlink.h
_RTM_NEWROUTE = 24
_RTM_GETROUTE = 26
_NLM_F_REQUEST = 1
_RTA_DST = 1
_RTN_UNICAST = 1
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")


class Routes:
    """Asks the kernel (rtnetlink(7)). For one thread."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._number = 0

    def lead_out(self, address: bytes) -> bool:
        """Whether packets to this IPv4 address leave the host: it has a route, and the address is
        neither the host's own nor a broadcast or multicast one. Raises OSError when the kernel
        does not tell."""
        self._number = self._number % 0xFFFFFFFF + 1
        size = _HEADER.size + _ROUTE.size + _ATTRIBUTE.size + 4
        self._socket.send(
            _HEADER.pack(size, _RTM_GETROUTE, _NLM_F_REQUEST, self._number, 0)
            + _ROUTE.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0)
            + _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, _RTA_DST)
            + address
        )
        while True:
            # The kernel has answered by the time send returns, so this never waits.
            answer = self._socket.recv(8192)
            _, kind, _, number, _ = _HEADER.unpack_from(answer)
            if number != self._number:
                continue
            if kind != _RTM_NEWROUTE:
                return False  # an error: there is no route
            return int(_ROUTE.unpack_from(answer, _HEADER.size)[7]) == _RTN_UNICAST

    def close(self) -> None:
        """Close the socket. Again is fine."""
        self._socket.close()
