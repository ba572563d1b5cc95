"""The addresses of the user-mode network: the same for every guest, as each has its own network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

ADDRESS = IPv4Address("10.0.2.15")
"""The guest's address. It is set by hand; there is no DHCP."""

PREFIX = 24
"""Length in bits of the guest's network prefix."""

NETWORK = IPv4Network((int(ADDRESS) >> (32 - PREFIX) << (32 - PREFIX), PREFIX))
"""The guest's network. Nothing is in it but the guest, ``GATEWAY`` and ``DNS``."""

GATEWAY = IPv4Address("10.0.2.2")
"""The way out. Its named TCP ports are those of the host's 127.0.0.1."""

DNS = IPv4Address("10.0.2.3")
"""Port 53 (UDP) leads to the host's first name server."""

MAC = "52:54:00:12:34:56"
"""The hardware address of the guest's card, locally administered. Frames from another are
dropped."""

GATEWAY_MAC = "52:55:0a:00:02:02"
"""The hardware address of everything else in the network: locally administered."""

MTU = 32768
"""The largest IPv4 packet in bytes. A frame of it still goes to passt in one piece
(``vm/network/frame_port.py``); the fewer frames, the fewer turns of the filter. A card that can't
receive a packet in several buffers uses 1500, which works as well."""

MAX_FRAME = 65535 + 14
"""The largest frame in bytes that is taken in: an Ethernet header and the largest IPv4 packet."""
