"""Moves frames between a machine and passt through the filter."""

from __future__ import annotations

import time

from voidbus.vm.network.frame_filter import FrameFilter
from voidbus.vm.network.frame_port import BACKLOG, PIECE, FramePort, framed


class Relay:
    """Both directions between two ports. Nothing here waits; the caller polls the ports and calls
    ``from_guest`` and ``from_passt`` when they are readable."""

    def __init__(self, guest: FramePort, passt: FramePort, frame_filter: FrameFilter) -> None:
        self._guest = guest
        self._passt = passt
        self._filter = frame_filter
        self.sent_frames = 0
        self.sent_bytes = 0
        self.received_frames = 0
        self.received_bytes = 0
        self.answered = 0
        self.dropped = 0

    @property
    def reads_guest(self) -> bool:
        """Whether passt keeps up, so that there is room for what the guest sends."""
        return self._passt.waiting < BACKLOG

    @property
    def reads_passt(self) -> bool:
        """Whether the machine keeps up, so that there is room for what passt sends."""
        return self._guest.waiting < BACKLOG

    def from_guest(self) -> bool:
        """Read the machine's socket and pass on what may pass. False when it is closed. Raises
        FrameError."""
        port, judge = self._guest, self._filter.judge
        alive = port.receive()
        now = time.monotonic()
        run = _Run(self._passt, port.buffer)
        for start, end in port.frames():
            answer = judge(port.buffer, start, end, now)
            if answer is None:
                run.extend(start, end)
            else:
                run.end()
                self._stop(answer)
        run.end()
        self.sent_frames += run.frames
        self.sent_bytes += run.bytes
        for frame in self._filter.outward:
            self._passt.send(framed(frame))
        self._filter.outward.clear()
        return alive

    def from_passt(self) -> bool:
        """Read passt's socket and pass all of it on. False when it is closed. Raises
        FrameError."""
        port, observe = self._passt, self._filter.observe
        alive = port.receive()
        run = _Run(self._guest, port.buffer)
        for start, end in port.frames():
            observe(port.buffer, start, end)
            run.extend(start, end)
        run.end()
        self.received_frames += run.frames
        self.received_bytes += run.bytes
        return alive

    def _stop(self, answer: bytes) -> None:
        if not answer:
            self.dropped += 1
            return
        self.answered += 1
        if self._guest.waiting < BACKLOG:
            self._guest.send(framed(answer))


class _Run:
    """Frames that pass, one after the other in the buffer, to be copied as one piece."""

    def __init__(self, to: FramePort, buffer: bytearray) -> None:
        self._to = to
        self._buffer = buffer
        self._start = self._end = 0
        self.frames = 0
        self.bytes = 0

    def extend(self, start: int, end: int) -> None:
        if end - self._start > PIECE:
            self.end()
        if not self._end:
            self._start = start - 4
        self._end = end
        self.frames += 1
        self.bytes += end - start

    def end(self) -> None:
        if self._end:
            self._to.send(bytes(self._buffer[self._start : self._end]))
            self._end = 0
