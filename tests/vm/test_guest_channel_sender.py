from __future__ import annotations

import socket

import pytest

from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.sender import MAX_QUEUED, Sender


def fill(sender: Sender, frames: int) -> None:
    for _ in range(frames):
        sender.put(bytes(8))


def test_short_frames_that_nobody_takes_are_bounded_by_what_they_take_in_memory() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    sender = Sender(ours, lambda _: None, "sender")
    try:
        with ours, theirs, pytest.raises(ChannelFault) as caught:
            fill(sender, MAX_QUEUED // 50)  # the bytes alone would fit
        assert caught.value.reason is FaultReason.OVERLOADED
    finally:
        sender.close()
