"""What of a guest's frames reaches passt. Pure but for the question whether an address is local.

A frame passes when it is Ethernet from the guest's card to the gateway's, IPv4 without options and
fragments from the guest's address, as long as it says, and TCP, UDP or an ICMP echo request to
where the rules let the guest go. Everything else is dropped, or answered here with a refusal. ARP
is answered here, so passt sees nothing but such packets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import IPv4Network

from voidbus.vm.network.addresses import ADDRESS, DNS, GATEWAY, MTU, NETWORK
from voidbus.vm.network.connections import Admission, Connection, Connections, Flows
from voidbus.vm.network.packets import (
    ACK,
    ETHERNET_HEADER,
    FIN,
    FROM_GUEST,
    ICMP,
    IP_HEADER,
    MAC_BYTES,
    RST,
    SYN,
    TCP,
    TCP_HEADER,
    TCP_START,
    UDP,
    arp_reply,
    echo_reply,
    prohibited,
    tcp_abort,
    tcp_reset,
    window_scale,
)
from voidbus.vm.network.rules import NetworkRules

DROP = b""
"""The verdict on a frame that goes nowhere and gets no answer."""

UDP_PORTS = 4096
"""Ports of the guest that send UDP at a time; each is a socket in passt for 180 s."""

UDP_SECONDS = 180.0
ECHO_IDS = 64
"""ICMP echo identifiers at a time; each is a socket in passt for 60 s."""

ECHO_SECONDS = 60.0

LEAST_WINDOW = 64 * 1024
"""The receive window every connection may have, in bytes, however many there are."""

LOCALITY_SECONDS = 5.0
"""How long the kernel's word on whether an address is local holds."""

LOCALITIES = 4096

_IPV4 = FROM_GUEST + b"\x45"
"""How every frame that may pass begins: up to the IPv4 header's version and its length, which
allows no options (source routes among them)."""

_SHORTEST = 60
"""Frames may be padded to so many bytes: Ethernet's shortest, without its check sequence."""

_ARP = MAC_BYTES + b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01" + MAC_BYTES + ADDRESS.packed
"""An ARP request from the guest, behind the Ethernet destination."""

_NEVER = (
    IPv4Network("0.0.0.0/8"),  # "this" network: Linux takes it for itself
    IPv4Network("127.0.0.0/8"),  # loopback
    IPv4Network("224.0.0.0/3"),  # multicast, reserved, broadcast
    NETWORK,  # its gateway and name server are asked about before this
)
"""Where no guest ever gets (IANA special-purpose registry, RFC 6890)."""

_LEAST = IP_HEADER + 8

_LENGTHS = struct.Struct(">H2xHxB")  # total length, fragment field, protocol: from byte 16
_PORT = struct.Struct(">H")


class FrameFilter:
    """The filter for one guest. ``leads_out`` tells for an IPv4 address (4 bytes) whether packets
    to it leave the host. For one thread, but ``allow_host_port`` for any.

    ``window`` is how many bytes may be on their way to the guest. passt sends as much as the guest
    has room for, and loses what the socket to us does not hold; it then sends all from there on
    again. So the receive windows the guest offers are cut down to a share of ``window``.
    """

    def __init__(
        self, rules: NetworkRules, leads_out: Callable[[bytes], bool], window: int = 1 << 20
    ) -> None:
        self.window = window
        self._leads_out = leads_out
        self._host_ports = rules.host_ports
        self._denied = [
            (int(network.network_address), int(network.netmask))
            for network in (*_NEVER, *rules.denied)
        ]
        self._connections = Connections(rules.connections, rules.connections_per_second)
        self._udp = Flows(UDP_PORTS, UDP_SECONDS)
        self._echo = Flows(ECHO_IDS, ECHO_SECONDS)
        self._localities: dict[bytes, tuple[bool, float]] = {}
        self.outward: list[bytes] = []
        """Frames for passt that the guest has not sent: whoever calls ``judge`` takes them."""

    def allow_host_port(self, port: int) -> None:
        """Let connections to the gateway's ``port`` pass from now on."""
        self._host_ports = self._host_ports | {port}

    def judge(self, buffer: bytearray, start: int, end: int, now: float) -> bytes | None:
        """The verdict on the guest's frame ``buffer[start:end]`` at ``now`` (seconds, monotonic):
        None when it passes, ``DROP``, or the frame that answers it. The receive window of a
        frame that passes may have been made smaller in the buffer."""
        if buffer[start : start + 15] != _IPV4 or end - start < ETHERNET_HEADER + _LEAST:
            return self._arp(bytes(buffer[start:end]))
        total, fragment, protocol = _LENGTHS.unpack_from(buffer, start + 16)
        spare = end - start - ETHERNET_HEADER - total
        # Each of the three protocols has a header of 8 bytes at least.
        if spare < 0 or (spare and end - start > _SHORTEST) or total < _LEAST or total > MTU:
            return DROP
        if fragment & ~0x4000:
            return DROP  # of the fragment field only "don't fragment" may be set
        if protocol == TCP:
            if total < IP_HEADER + TCP_HEADER:
                return DROP
            header = (buffer[start + 46] >> 4) * 4
            if total < IP_HEADER + header or header < TCP_HEADER:
                return DROP
            key = bytes(buffer[start + 26 : start + 38])
            flags = buffer[start + 47]
            connection = self._connections.find(key)
            if connection is not None and not flags & (SYN | RST):
                connection.last = now
                self._cut_window(connection, buffer, start + 48)
                if not flags & FIN:
                    return None
            return self._tcp(key, flags, bytes(buffer[start:end]), now)
        return self._datagram(protocol, total, bytes(buffer[start:end]), now)

    def observe(self, buffer: bytearray, start: int, end: int) -> None:
        """Note what passt sends to the guest, ``buffer[start:end]``: it ends connections."""
        if end - start < TCP_START + TCP_HEADER or buffer[start + 23] != TCP:
            return
        flags = buffer[start + 47]
        if flags & (FIN | RST) and buffer[start + 12 : start + 15] == b"\x08\x00\x45":
            frame = bytes(buffer[start : start + 38])
            key = frame[30:34] + frame[26:30] + frame[36:38] + frame[34:36]
            self._connections.host_flags(key, flags)

    def _arp(self, frame: bytes) -> bytes:
        asked = frame[38:42]
        if frame[6:32] == _ARP and asked in (GATEWAY.packed, DNS.packed):
            return arp_reply(frame)
        return DROP

    def _tcp(self, key: bytes, flags: int, frame: bytes, now: float) -> bytes | None:
        if key[:4] != ADDRESS.packed:
            return DROP
        if not flags & SYN:
            return self._tcp_ending(key, flags, frame)
        if flags & (FIN | RST | ACK):
            return DROP
        if self._connections.is_open(key):
            return None  # asked again
        if not self._tcp_allowed(key[4:8], key[10:12], now):
            return tcp_reset(frame)
        admission, evicted = self._connections.admit(key, now, window_scale(frame))
        if admission is Admission.FULL:
            return tcp_reset(frame)
        if evicted is not None:
            self.outward.append(tcp_abort(evicted[:4], evicted[4:8], evicted[8:12]))
        return None if admission is Admission.OPENED else DROP

    def _tcp_ending(self, key: bytes, flags: int, frame: bytes) -> bytes | None:
        if self._connections.find(key) is None:
            return DROP if flags & RST else tcp_reset(frame)
        self._connections.guest_flags(key, flags)
        return None

    def _cut_window(self, connection: Connection, buffer: bytearray, place: int) -> None:
        # passt does not look at the segment's checksum, which covers a memory copy only.
        share = self.window // (len(self._connections) or 1)
        most = (share if share > LEAST_WINDOW else LEAST_WINDOW) >> connection.scale
        if (buffer[place] << 8) + buffer[place + 1] > most:
            _PORT.pack_into(buffer, place, most)

    def _tcp_allowed(self, destination: bytes, port: bytes, now: float) -> bool:
        if destination == GATEWAY.packed:
            return _PORT.unpack(port)[0] in self._host_ports
        return self._outside(destination, now)

    def _datagram(self, protocol: int, total: int, frame: bytes, now: float) -> bytes | None:
        if frame[26:30] != ADDRESS.packed:
            return DROP
        destination = frame[30:34]
        if protocol == UDP:
            if _PORT.unpack_from(frame, TCP_START + 4)[0] != total - IP_HEADER:
                return DROP
            if destination == DNS.packed and frame[36:38] == b"\0\x35":
                allowed = True
            else:
                allowed = self._outside(destination, now)
            flows = self._udp
            flow = frame[34:36]
        elif protocol == ICMP and frame[34:36] == b"\x08\0":
            if destination == GATEWAY.packed:
                return echo_reply(frame)
            allowed = self._outside(destination, now)
            flows = self._echo
            flow = frame[38:40]
        else:
            return DROP
        if not allowed:
            return DROP if _to_many(destination) else prohibited(frame)
        return None if flows.use(flow, now) else DROP

    def _outside(self, destination: bytes, now: float) -> bool:
        known = self._localities.get(destination)
        if known is not None and now < known[1]:
            return known[0]
        address = int.from_bytes(destination)
        outside = False
        if not any(address & mask == network for network, mask in self._denied):
            try:
                outside = self._leads_out(destination)
            except OSError:
                outside = False  # not known is not allowed
        if len(self._localities) >= LOCALITIES:
            self._localities.clear()
        self._localities[destination] = (outside, now + LOCALITY_SECONDS)
        return outside


def _to_many(destination: bytes) -> bool:
    """Multicast and broadcast are never answered (RFC 1122, 3.2.2)."""
    return destination[0] >= 224 or destination == NETWORK.broadcast_address.packed
