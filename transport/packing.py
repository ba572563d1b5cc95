"""Small messages that leave for the same node at the same time, packed into one of ZeroMQ's.

Each message of ZeroMQ costs its sender, its receiver and the I/O threads of both 3 us, a fifth of
what an ask across processes costs where hundreds are under way. One that leaves alone is not
packed, so nothing waits to be packed.

A pack is one frame: a byte that is in no UTF-8 text, as an envelope's destination is, then the
envelopes, each behind its length in 32 bits. Whether the other end reads packs it says in its
HELLO or WELCOME.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from voidbus.transport.envelope import Envelope, FrameError

PACK_LIMIT = 32 * 1024
"""Bytes of a pack. Every other link waits while one is taken apart and handled: 10 ms at most."""

# A larger message is not worth the copy.
_SMALL = 4 * 1024
_MARK = b"\xff"  # RFC 3629, section 1
_LENGTH = struct.Struct("!I")

Packet = tuple[Sequence[bytes], Sequence[Envelope]]
"""Frames to send as one message, and whose they are."""


def packets(
    envelopes: Sequence[Envelope], *, packed: bool, on_refused: Callable[[Envelope, str], None]
) -> Iterator[Packet]:
    """What to send, in its order, written when it is asked for. `on_refused` gets what can't be
    written, and why."""
    frames: list[bytes] = []
    together: list[Envelope] = []
    size = 0
    for envelope in envelopes:
        try:
            parts = envelope.frames()
        except FrameError as error:
            on_refused(envelope, str(error))
            continue
        length = len(parts[0]) + _LENGTH.size
        is_small = packed and len(parts) == 1 and length <= _SMALL
        if together and (not is_small or size + length >= PACK_LIMIT):
            yield pack(frames), together
            frames, together, size = [], [], 0
        if is_small:
            frames += parts
            together.append(envelope)
            size += length
        else:
            yield parts, (envelope,)
    if together:
        yield pack(frames), together


def pack(frames: list[bytes]) -> list[bytes]:
    """Envelopes of one frame each as one message."""
    if len(frames) == 1:
        return frames
    parts = [_MARK]
    for frame in frames:
        parts += (_LENGTH.pack(len(frame)), frame)
    return [b"".join(parts)]


def is_pack(frames: Sequence[bytes]) -> bool:
    return bool(frames) and frames[0][:1] == _MARK


def unpack(frames: Sequence[bytes]) -> list[list[bytes]]:
    """The envelopes of a pack, each as its frames. Raises FrameError."""
    frame = frames[0]
    if len(frames) > 1 or len(frame) > PACK_LIMIT:
        raise FrameError(f"a pack has one frame of at most {PACK_LIMIT} bytes")
    envelopes = []
    at = len(_MARK)
    while at < len(frame):
        if at + _LENGTH.size > len(frame):
            raise FrameError("a pack is cut off")
        (length,) = _LENGTH.unpack_from(frame, at)
        at += _LENGTH.size
        if not length or at + length > len(frame):
            raise FrameError("a pack holds an impossible length")
        envelopes.append([frame[at : at + length]])
        at += length
    return envelopes
