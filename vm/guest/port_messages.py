"""Messages of forwarded ports; what streams carry is in forward.py."""

from __future__ import annotations

from typing import NamedTuple

from .bodies import decode_body, encode_body
from .fields import number, optional_text


class Listening(NamedTuple):
    """Answer to FORWARD_LISTEN: the port really listened on, or why there is none."""

    port: int
    error: str | None = None


def encode_port(port: int) -> bytes:
    """The body of FORWARD_LISTEN and FORWARD_OPEN."""
    return encode_body({"port": port})


def decode_port(body: bytes) -> int:
    return number(decode_body(body)[0], "port", high=65535)


def encode_listening(message: Listening) -> bytes:
    return encode_body(message._asdict())


def decode_listening(body: bytes) -> Listening:
    values = decode_body(body)[0]
    return Listening(number(values, "port", high=65535), optional_text(values, "error"))
