"""What a socket device counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class VsockStats:
    """Counters since the start, but ``connections``, which is now. Written by the device's
    thread only; a reader sees each of them whole."""

    packets_from_guest: int = 0
    packets_to_guest: int = 0
    bytes_from_guest: int = 0
    """Bytes of streams, without headers; the same below."""
    bytes_to_guest: int = 0
    resets: int = 0
    """Accepted connections that a reset of either side, or a deadline, ended."""
    refused: int = 0
    """Connections that never came about, of either side."""
    dropped: int = 0
    """Packets of the guest that made no sense and belonged to nobody."""
    connections: int = 0
