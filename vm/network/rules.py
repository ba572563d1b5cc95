"""Where a guest may go: addresses, ports, and how many connections."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network

LINK_LOCAL = IPv4Network("169.254.0.0/16")
"""Link-local addresses (RFC 3927). Clouds hand out credentials there."""


@dataclass(frozen=True)
class NetworkRules:
    """What the guest may reach. Whatever these say, it never reaches loopback, the host's own
    addresses, multicast, broadcast, reserved addresses or IPv6."""

    host_ports: frozenset[int] = frozenset()
    """TCP ports of the host's 127.0.0.1 that 10.0.2.2 offers under the same number."""

    denied: tuple[IPv4Network, ...] = (LINK_LOCAL,)
    """Networks that are refused."""

    connections_per_second: int = 50
    """New TCP connections in a second; those over it are delayed, not refused."""

    connections: int = 64
    """TCP connections at one time; more are refused."""
