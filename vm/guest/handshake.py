"""The handshake: one Ping with the secret, one Pong, and the flags both sides share.

Ping: 32-byte secret, ``u32 LE`` version, ``u8`` flags. Pong: ``u32 LE`` version, ``u8``
flags. Both are raw, without a request id. The version is never compared.
"""

from __future__ import annotations

import enum
import struct

# What hmac.compare_digest is; hmac itself loads OpenSSL, which takes a guest long.
from _operator import _compare_digest as compare_digest
from typing import NamedTuple

from .frames import ProtocolError

PROTOCOL_VERSION = 2
SECRET_BYTES = 32

_VERSION_FLAGS = struct.Struct("<IB")


class Flags(enum.IntFlag):
    """What a side can do. A bit counts only when both sides set it.

    ``MULTIPLEX`` is the base protocol and mandatory; a peer that lacks any of the others
    gets the base protocol's behaviour in its place.
    """

    MULTIPLEX = 1
    CONCURRENT = 2
    """The guest runs requests of one connection side by side, and takes SIGNAL."""
    RAW_BODIES = 4
    """Byte fields travel raw (see bodies.py), not as JSON arrays of integers."""
    PORT_FORWARD = 8
    """The guest can listen on local ports and carry their streams to the host."""
    CONFIGURE = 16
    """The host says by CONFIGURE what programs must keep to, and the guest runs none before."""
    WATCH_FILES = 32
    """The guest tells by itself when a file the host asked for is complete."""


EVERYTHING = (
    Flags.MULTIPLEX
    | Flags.CONCURRENT
    | Flags.RAW_BODIES
    | Flags.PORT_FORWARD
    | Flags.CONFIGURE
    | Flags.WATCH_FILES
)
BASE_PROTOCOL = Flags.MULTIPLEX


class Ping(NamedTuple):
    secret: bytes
    version: int
    flags: Flags


class Pong(NamedTuple):
    version: int
    flags: Flags


def encode_ping(secret: bytes, flags: Flags = EVERYTHING) -> bytes:
    """A Ping payload. Raises ValueError when the secret is not 32 bytes."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
    return secret + _VERSION_FLAGS.pack(PROTOCOL_VERSION, flags)


def decode_ping(payload: bytes) -> Ping:
    """A Ping as it came. Shorter, older forms parse as version 0 without flags.

    Raises ProtocolError when there is not even a secret.
    """
    if len(payload) < SECRET_BYTES:
        raise ProtocolError("Ping without a secret")
    rest = payload[SECRET_BYTES:]
    if len(rest) < _VERSION_FLAGS.size:
        return Ping(payload[:SECRET_BYTES], 0, Flags(0))
    version, flags = _VERSION_FLAGS.unpack_from(rest)
    return Ping(payload[:SECRET_BYTES], version, Flags(flags) & EVERYTHING)


def encode_pong(flags: Flags = EVERYTHING) -> bytes:
    """A Pong payload."""
    return _VERSION_FLAGS.pack(PROTOCOL_VERSION, flags)


def decode_pong(payload: bytes) -> Pong:
    """A Pong. Raises ProtocolError when it is short or lacks the mandatory flag."""
    if len(payload) < _VERSION_FLAGS.size:
        raise ProtocolError(f"Pong of {len(payload)} bytes")
    version, flags = _VERSION_FLAGS.unpack_from(payload)
    pong = Pong(version, Flags(flags) & EVERYTHING)
    if Flags.MULTIPLEX not in pong.flags:
        raise ProtocolError("the guest does not offer multiplexing, which is mandatory")
    return pong


def accepts(ping: Ping, secret: bytes) -> bool:
    """Whether a guest with this secret answers the Ping (constant-time compare)."""
    if len(secret) != SECRET_BYTES:
        return False
    matches = compare_digest(ping.secret, secret)
    return matches and Flags.MULTIPLEX in ping.flags
