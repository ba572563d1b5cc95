"""Reaching a guest: connect and shake hands, again and again until it is up or time is."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.frames import FrameDecoder, MessageType, ProtocolError, encode_frame
from voidbus.vm.guest.handshake import EVERYTHING, Flags, decode_pong, encode_ping

Dial = Callable[[], socket.socket]
"""Makes one stream connection to the guest agent. Raises OSError while there is none."""

DEADLINE_VARIABLE = "VOID_BOX_CONNECT_DEADLINE_SECS"

# Protocol, "Handshake": retry pauses double from the first to the last, and so does the time
# one Pong may take.
BACKOFF = (0.025, 0.250)
PONG_WAIT = (0.005, 0.150)
DEADLINE_RANGE = (30.0, 3600.0)

_SLICE = 0.05
"""How often, in seconds, a wait looks whether it has been given up."""


def connect_deadline(environ: Mapping[str, str] = os.environ) -> float:
    """Seconds a guest may take to answer: 30, or what the variable says within 30 to 3600."""
    low, high = DEADLINE_RANGE
    try:
        return min(high, max(low, float(environ[DEADLINE_VARIABLE])))
    except (KeyError, ValueError):
        return low


@dataclass(frozen=True)
class Connected:
    """An authenticated connection: the socket, non-blocking, and the flags both sides set."""

    sock: socket.socket
    flags: Flags


def connect_guest(
    dial: Dial,
    secret: bytes,
    timeout: float,
    *,
    flags: Flags = EVERYTHING,
    pong_wait: tuple[float, float] = PONG_WAIT,
    given_up: Callable[[], str | None] = lambda: None,
) -> Connected:
    """Connect and authenticate within ``timeout`` seconds. ``given_up`` is asked between
    tries; a text ends them.

    Raises ChannelFault: DEADLINE with the last failure, or CLOSED with the text.
    """
    deadline = time.monotonic() + timeout
    pause, longest_pause = BACKOFF
    patience, longest_patience = pong_wait
    failure = "no try was made"
    waiting = threading.Event()
    while time.monotonic() < deadline:
        _check(given_up)
        try:
            until = min(deadline, time.monotonic() + patience)
            return _attempt(dial, secret, flags, until, given_up)
        except (OSError, ProtocolError) as error:
            failure = str(error) or type(error).__name__
        _check(given_up)
        waiting.wait(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(longest_pause, pause * 2)
        patience = min(longest_patience, patience * 2)
    raise ChannelFault(
        FaultReason.DEADLINE, f"the guest did not answer in {timeout:g} s; last try: {failure}"
    )


def _check(given_up: Callable[[], str | None]) -> None:
    if (text := given_up()) is not None:
        raise ChannelFault(FaultReason.CLOSED, text)


def _attempt(
    dial: Dial, secret: bytes, flags: Flags, until: float, given_up: Callable[[], str | None]
) -> Connected:
    sock = dial()
    try:
        sock.settimeout(max(0.001, until - time.monotonic()))
        sock.sendall(encode_frame(MessageType.PING, encode_ping(secret, flags)))
        offered = decode_pong(_read_pong(sock, until, given_up))
        sock.setblocking(False)
        return Connected(sock, flags & offered.flags)
    except BaseException:
        sock.close()
        raise


def _read_pong(sock: socket.socket, until: float, given_up: Callable[[], str | None]) -> bytes:
    decoder = FrameDecoder(limit=256)
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no Pong in time")
        sock.settimeout(min(left, _SLICE))
        try:
            # A Pong is the only thing a guest may send before the
            # first request, so what is read here is never part of anything else.
            data = sock.recv(256)
        except TimeoutError:
            _check(given_up)
            continue
        if not data:
            raise ConnectionError("the guest closed the connection instead of answering the Ping")
        frames = decoder.feed(data)
        if not frames:
            continue
        if len(frames) != 1 or frames[0].type != MessageType.PONG or decoder.buffered:
            raise ProtocolError("the guest answered the Ping with something else than a Pong")
        return frames[0].payload
