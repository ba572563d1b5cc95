"""The frames the filter writes itself: what it answers a guest in place of the network.

Each takes a frame of the guest whose headers were checked: an Ethernet header and an ARP request,
or an Ethernet header and an IPv4 packet with a header of 20 bytes.
"""

from __future__ import annotations

import struct

from voidbus.vm.network.addresses import GATEWAY, GATEWAY_MAC, MAC

ETHERNET_HEADER = 14
IP_HEADER = 20
TCP_START = ETHERNET_HEADER + IP_HEADER
TCP_HEADER = 20

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
"""TCP control bits (RFC 9293, section 3.1)."""

TCP, UDP, ICMP = 6, 17, 1
"""IPv4 protocol numbers."""

GATEWAY_MAC_BYTES = bytes.fromhex(GATEWAY_MAC.replace(":", ""))
MAC_BYTES = bytes.fromhex(MAC.replace(":", ""))

TO_GUEST = MAC_BYTES + GATEWAY_MAC_BYTES + b"\x08\x00"
"""The Ethernet header of an IPv4 frame to the guest."""

FROM_GUEST = GATEWAY_MAC_BYTES + MAC_BYTES + b"\x08\x00"
"""The Ethernet header of an IPv4 frame from the guest."""

_PROHIBITED = b"\x03\x0d"
"""ICMP destination unreachable: communication administratively prohibited (RFC 1812, 5.2.7.1)."""


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def arp_reply(request: bytes) -> bytes:
    """An ARP reply (RFC 826): the address asked for is at ``GATEWAY_MAC``."""
    asker = request[22:32]
    asked = request[38:42]
    return (
        MAC_BYTES
        + GATEWAY_MAC_BYTES
        + b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x02"
        + GATEWAY_MAC_BYTES
        + asked
        + asker
    )


def tcp_reset(segment: bytes) -> bytes:
    """The reset that answers a segment for which there is no connection (RFC 9293, 3.5.2)."""
    number, acknowledged, offset, flags = struct.unpack_from(">IIBB", segment, TCP_START + 4)
    if flags & ACK:
        ours, theirs, answer = acknowledged, 0, RST
    else:
        (total,) = struct.unpack_from(">H", segment, ETHERNET_HEADER + 2)
        length = total - IP_HEADER - (offset >> 4) * 4 + bool(flags & SYN) + bool(flags & FIN)
        ours, theirs, answer = 0, (number + length) & 0xFFFFFFFF, RST | ACK
    source, destination = segment[26:30], segment[30:34]
    ports = segment[36:38] + segment[34:36]
    return TO_GUEST + _tcp_packet(destination, source, ports, ours, theirs, answer)


def window_scale(segment: bytes) -> int:
    """By how many bits the windows of a connection are scaled that begins with this SYN: its
    window scale option (RFC 7323, section 2), 0 without one."""
    options = segment[TCP_START + TCP_HEADER : TCP_START + (segment[TCP_START + 12] >> 4) * 4]
    place = 0
    while place + 2 < len(options) and options[place] != 0:
        if options[place] == 3 and options[place + 1] == 3:
            return min(options[place + 2], 14)
        place += 1 if options[place] == 1 else max(2, options[place + 1])
    return 0


def tcp_abort(source: bytes, destination: bytes, ports: bytes) -> bytes:
    """A reset in the guest's name, for a connection it no longer has. passt takes one whatever
    its sequence number."""
    return FROM_GUEST + _tcp_packet(source, destination, ports, 0, 0, RST)


def prohibited(packet: bytes) -> bytes:
    """The ICMP message that the packet's destination is not allowed, from the gateway."""
    (total,) = struct.unpack_from(">H", packet, ETHERNET_HEADER + 2)
    # The packet's header and eight bytes more (RFC 792).
    quoted = packet[ETHERNET_HEADER : ETHERNET_HEADER + min(total, IP_HEADER + 8)]
    sum_of_all = checksum(_PROHIBITED + b"\0\0\0\0\0\0" + quoted)
    message = _PROHIBITED + struct.pack(">HI", sum_of_all, 0) + quoted
    return TO_GUEST + _ip_header(GATEWAY.packed, packet[26:30], ICMP, len(message)) + message


def echo_reply(request: bytes) -> bytes:
    """The answer to an ICMP echo request (RFC 792)."""
    (total,) = struct.unpack_from(">H", request, ETHERNET_HEADER + 2)
    rest = request[TCP_START + 4 : ETHERNET_HEADER + total]
    message = b"\0\0" + struct.pack(">H", checksum(b"\0\0\0\0" + rest)) + rest
    return TO_GUEST + _ip_header(request[30:34], request[26:30], ICMP, len(message)) + message


def _tcp_packet(
    source: bytes, destination: bytes, ports: bytes, number: int, acknowledged: int, flags: int
) -> bytes:
    header = ports + struct.pack(">IIBBHHH", number, acknowledged, 5 << 4, flags, 0, 0, 0)
    pseudo = source + destination + struct.pack(">BBH", 0, TCP, len(header))
    header = header[:16] + struct.pack(">H", checksum(pseudo + header)) + header[18:]
    return _ip_header(source, destination, TCP, len(header)) + header


def _ip_header(source: bytes, destination: bytes, protocol: int, payload: int) -> bytes:
    # No fragments, time to live 64.
    start = struct.pack(">BBHHHBB", 0x45, 0, IP_HEADER + payload, 0, 0x4000, 64, protocol)
    addresses = source + destination
    return start + struct.pack(">H", checksum(start + b"\0\0" + addresses)) + addresses
