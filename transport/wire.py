"""Multipart messages in and out of a socket, without waiting.

pyzmq's own `send_multipart` and `recv_multipart` combine and compare enum flags for every frame:
a tenth of a busy node's time went into that (py-spy, 500 asks under way).
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from voidbus.transport.envelope import ATTACHMENTS_LIMIT

# One more than a message may have: routing identity, header and body, attachments.
FRAMES_KEPT = 2 + ATTACHMENTS_LIMIT + 1

_NOW = int(zmq.NOBLOCK)
_MORE_NOW = int(zmq.SNDMORE) | int(zmq.NOBLOCK)
_RCVMORE = int(zmq.RCVMORE)
_EVENTS = int(zmq.EVENTS)
_READABLE = int(zmq.POLLIN)


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[bytes]) -> None:
    """Send one message. Raises zmq.Again where it can't leave now; nothing of it has left then."""
    last = len(frames) - 1
    for frame in frames[:last]:
        socket.send(frame, _MORE_NOW)
    socket.send(frames[last], _NOW)


def receive_frames(socket: zmq.Socket[bytes]) -> list[bytes]:
    """Receive one message. Raises zmq.Again where there is none.

    Of one with more frames than any of ours, those past FRAMES_KEPT are read and let go; what is
    left has too many for every reader.
    """
    frames = [socket.recv(_NOW)]
    while socket.getsockopt(_RCVMORE):
        frame = socket.recv(_NOW)
        if len(frames) < FRAMES_KEPT:
            frames.append(frame)
    return frames


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message waits: a third of the price of being told so by zmq.Again."""
    return bool(int(socket.getsockopt(_EVENTS)) & _READABLE)
