"""Packets of the virtio socket device (virtio 1.2, section 5.10.6)."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

HOST_CID = 2
"""The host's address (5.10.4)."""
MIN_GUEST_CID = 3
MAX_CID = 0xFFFFFFFE
"""The largest address: the upper half of a CID is reserved, and -1U means any (vsock(7))."""

TYPE_STREAM = 1
F_STREAM = 1 << 0
"""The feature bit of stream sockets (5.10.3)."""

SHUTDOWN_RECEIVE = 1
SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = 3
"""Flags of SHUTDOWN: its sender will not receive, or not send, any more (5.10.6.6.1)."""

HEADER = struct.Struct("<QQIIIHHIII")
"""src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt: 44 bytes."""

WRAP = 0xFFFFFFFF
"""Counters of bytes are free-running, 32 bits."""


class Op(enum.IntEnum):
    """What a packet is for."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """One packet's header, in the order of ``HEADER``."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
