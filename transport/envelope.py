"""Envelopes as ZeroMQ frames: destination, header and body in one, then raw attachments.

The first frame begins with the destination and a NUL, so that a topic is a prefix of it; then the
fixed part of the header, its four NUL-separated strings, and the body, which is JSON. Each frame
more would cost 1.5 us at either end, and a JSON header 5 us where this one costs 1.3 us; an ask
across processes pays four times.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

from voidbus.transport.address import Address, AddressError, parse_address

WIRE_VERSION = 1

HEADER_LIMIT = 2 * 1024
BODY_LIMIT = 4 * 1024 * 1024
ATTACHMENT_LIMIT = 16 * 1024 * 1024
ATTACHMENTS_LIMIT = 16
TOTAL_LIMIT = 32 * 1024 * 1024
DEADLINE_LIMIT = 1e12
"""Seconds of bus time that are a deadline."""

# magic, wire version, kind, origin, sequence, deadline, generation, message version, and the
# length of the strings that follow
_FIXED = struct.Struct("!2sBBQQdIHH")
_MAGIC = b"vb"


class Kind(IntEnum):
    """What an envelope is for. HELLO to BYE are between two nodes and reach no actor."""

    TELL = 1
    ASK = 2
    REPLY = 3
    FAULT = 4
    PUBLISH = 5
    MARK = 6
    HELLO = 7
    WELCOME = 8
    REFUSED = 9
    UNKNOWN_LINK = 10
    PING = 11
    PONG = 12
    BYE = 13


class FrameError(ValueError):
    """Frames that are no envelope."""


class Envelope:
    """One message on the wire.

    `origin` and `sequence` identify it: the sending node's random instance number and its own
    counter (for PUBLISH and MARK: the topic's epoch and sequence number). A reply or fault bears
    the numbers of what it answers. `deadline` is seconds of bus time (the hub's monotonic clock);
    0 where there is none. `key` marks a repeat of the same command. `body` is JSON. `size` is the
    bytes of body and attachments, for queue bounds.
    """

    __slots__ = (
        "attachments",
        "body",
        "deadline",
        "dest",
        "generation",
        "key",
        "kind",
        "origin",
        "sender",
        "sequence",
        "size",
        "tag",
        "trace",
        "version",
    )

    def __init__(
        self,
        kind: Kind,
        dest: str,
        sender: str,
        *,
        origin: int = 0,
        sequence: int = 0,
        tag: str = "",
        version: int = 1,
        deadline: float = 0.0,
        generation: int = 0,
        key: str = "",
        trace: str = "",
        body: bytes = b"",
        attachments: Sequence[bytes] = (),
    ) -> None:
        self.kind = kind
        self.dest = dest
        self.sender = sender
        self.origin = origin
        self.sequence = sequence
        self.tag = tag
        self.version = version
        self.deadline = deadline
        self.generation = generation
        self.key = key
        self.trace = trace
        self.body = body
        self.attachments = attachments
        self.size = len(body) + sum(map(len, attachments)) if attachments else len(body)

    def frames(self) -> list[bytes]:
        """The frames to send. Raises FrameError when a part is over its limit or unwritable."""
        strings = f"{self.tag}\0{self.sender}\0{self.key}\0{self.trace}"
        if strings.count("\0") != 3 or "\0" in self.dest:
            raise FrameError(f"{self.tag!r}: a header field holds a NUL")
        try:
            dest, fields = self.dest.encode(), strings.encode()
            fixed = _FIXED.pack(
                _MAGIC,
                WIRE_VERSION,
                self.kind,
                self.origin,
                self.sequence,
                self.deadline,
                self.generation,
                self.version,
                len(fields),
            )
        except (struct.error, UnicodeEncodeError) as error:
            raise FrameError(f"{self.tag}: a header field cannot be written: {error}") from None
        if len(dest) + len(fields) > HEADER_LIMIT:
            raise FrameError(f"header of {len(dest) + len(fields)} bytes is over {HEADER_LIMIT}")
        if len(self.body) > BODY_LIMIT:
            raise FrameError(
                f"{self.tag} has a body of {len(self.body)} bytes, over {BODY_LIMIT}; "
                "send bulk data as attachments"
            )
        first = b"".join((dest, b"\0", fixed, fields, self.body))
        if not self.attachments:
            return [first]
        frames = [first, *self.attachments]
        _check_attachments(frames)
        return frames


def _check_attachments(frames: Sequence[bytes]) -> None:
    if len(frames) - 1 > ATTACHMENTS_LIMIT:
        raise FrameError(f"{len(frames) - 1} attachments, over {ATTACHMENTS_LIMIT}")
    if any(len(frame) > ATTACHMENT_LIMIT for frame in frames[1:]):
        raise FrameError(f"an attachment is over {ATTACHMENT_LIMIT} bytes")
    if sum(map(len, frames)) > TOTAL_LIMIT:
        raise FrameError(f"the message is over {TOTAL_LIMIT} bytes")


def read_envelope(frames: Sequence[bytes]) -> Envelope:
    """Read frames from anywhere. Raises FrameError, and nothing else, on bytes that don't parse."""
    if not frames:
        raise FrameError("no frames")
    first = frames[0]
    start = first.find(b"\0", 0, HEADER_LIMIT) + 1
    if not start or len(first) < start + _FIXED.size:
        raise FrameError("not an envelope")
    magic, wire, kind, origin, sequence, deadline, generation, version, length = _FIXED.unpack_from(
        first, start
    )
    if magic != _MAGIC:
        raise FrameError("not an envelope")
    if wire != WIRE_VERSION:
        raise FrameError(f"wire version {wire}; this node speaks {WIRE_VERSION}")
    if not 0.0 <= deadline < DEADLINE_LIMIT:  # a NaN fails both comparisons
        raise FrameError("the deadline is not a time")
    fields = start + _FIXED.size
    body = fields + length
    if length > HEADER_LIMIT or body > len(first):
        raise FrameError("the header has an impossible size")
    if len(first) - body > BODY_LIMIT:
        raise FrameError(f"body of {len(first) - body} bytes is over {BODY_LIMIT}")
    if len(frames) > 1:
        _check_attachments(frames)
    try:
        tag, sender, key, trace = first[fields:body].decode().split("\0")
        return Envelope(
            _KINDS[kind],
            first[: start - 1].decode(),
            sender,
            origin=origin,
            sequence=sequence,
            tag=tag,
            version=version,
            deadline=deadline,
            generation=generation,
            key=key,
            trace=trace,
            body=first[body:],
            attachments=frames[1:],
        )
    except (ValueError, KeyError):
        raise FrameError("header fields do not parse") from None


def destination(envelope: Envelope) -> Address:
    """The address an envelope is for. Raises FrameError."""
    try:
        return parse_address(envelope.dest)
    except AddressError as error:
        raise FrameError(str(error)) from None


_KINDS = {int(kind): kind for kind in Kind}
