"""Asking a guest for its files again and again, when it can't tell of them by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable

from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.file_messages import MAX_WATCHED, FileStat, decode_file_stat, encode_path
from voidbus.vm.guest.frames import MessageType
from voidbus.vm.multiplexer import Slot, guarded


class _File:
    """One file that is asked for. One question at a time is under way: a guest that is busy
    with a program answers when that has ended, and must not find a thousand questions then."""

    def __init__(self, path: str, on_change: Callable[[FileStat], None]) -> None:
        self.path = path
        self.asked = False
        self._on_change = on_change
        self._first = True
        self._size: int | None = None
        self._told: int | None = None

    def answered(self, body: bytes) -> None:
        found = decode_file_stat(body)
        size = found.size if found.exists and found.error is None else None
        settled = self._first or size == self._size
        self._first, self._size = False, size
        if settled and size is None:
            self._told = None
        if settled and size and size != self._told:
            self._told = size
            guarded(self._on_change, FileStat(True, size))
        self.asked = False


class FilePoller:
    """A thread that asks for every file each ``interval`` seconds, until ``close`` or the
    channel's end. ``begin`` puts a call on the channel."""

    def __init__(
        self, begin: Callable[[Slot, MessageType, bytes], int], interval: float, name: str
    ) -> None:
        self._begin = begin
        self._interval = interval
        self._lock = threading.Lock()
        self._files: list[_File] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, path: str, on_change: Callable[[FileStat], None]) -> None:
        """Ask for one more file, from now on. Raises ChannelFault."""
        file = _File(path, on_change)
        with self._lock:
            if len(self._files) >= MAX_WATCHED:
                detail = (
                    f"watch of {path}: {MAX_WATCHED} files are watched already; that is the most"
                )
                raise ChannelFault(FaultReason.REFUSED, detail)
            self._ask(file)
            self._files.append(file)

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            with self._lock:
                files = [file for file in self._files if not file.asked]
            for file in files:
                try:
                    self._ask(file)
                except ChannelFault as fault:
                    if fault.reason != FaultReason.OVERLOADED:
                        return  # the channel has ended

    def _ask(self, file: _File) -> None:
        slot = Slot(
            MessageType.FILE_STAT_RESPONSE,
            None,
            file.answered,
            lambda _: self._closing.set(),  # comes only with the channel's end
            what=f"stat of {file.path}",
        )
        file.asked = True
        try:
            self._begin(slot, MessageType.FILE_STAT, encode_path(file.path))
        except ChannelFault:
            file.asked = False
            raise
