"""Multipart messages in and out of a socket, without waiting.

pyzmq's own `send_multipart` and `recv_multipart` combine and compare enum flags for every frame: a
tenth of a busy node's time went into that (py-spy, 500 asks under way). Its `getsockopt` makes an
enum of the option's number in Python, 2 us each; a Frame knows without it whether more follow, and
`zmq_poll` whether a message waits. A Frame costs 0.4 us itself, which a ROUTER's first one, the
identity that more always follow, does without.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq
from zmq.backend import zmq_poll

from voidbus.transport.envelope import ATTACHMENTS_LIMIT

# One more than a message may have: routing identity, header and body, attachments.
FRAMES_KEPT = 2 + ATTACHMENTS_LIMIT + 1

_NOW = int(zmq.NOBLOCK)
_MORE_NOW = int(zmq.SNDMORE) | int(zmq.NOBLOCK)
_READABLE = int(zmq.POLLIN)

# The backend's own method: pyzmq's wrapper around it looks for arguments we never give, 0.6 us.
_send = zmq.backend.Socket.send
_receive = zmq.backend.Socket.recv


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[bytes]) -> None:
    """Send one message. Raises zmq.Again where it can't leave now; nothing of it has left then."""
    last = len(frames) - 1
    for frame in frames[:last]:
        _send(socket, frame, _MORE_NOW)
    _send(socket, frames[last], _NOW)


def receive_frames(socket: zmq.Socket[bytes], *, routed: bool = False) -> list[bytes]:
    """Receive one message, `routed` from a ROUTER. Raises zmq.Again where there is none.

    Of one with more frames than any of ours, those past FRAMES_KEPT are read and let go; what is
    left has too many for every reader.
    """
    frames = [_receive(socket, _NOW)] if routed else []
    frame = _receive(socket, _NOW, False)
    frames.append(frame.bytes)
    while frame.more:
        frame = _receive(socket, _NOW, False)
        if len(frames) < FRAMES_KEPT:
            frames.append(frame.bytes)
    return frames


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message waits: a third of the price of being told so by zmq.Again."""
    return bool(zmq_poll([(socket, _READABLE)], 0))
