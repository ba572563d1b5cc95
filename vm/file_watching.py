"""The part of a channel that is told when files of the guest are complete."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar

from voidbus.vm.connect import Connected
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.file_polling import FilePoller
from voidbus.vm.guest.file_messages import FileStat, decode_file_changed, encode_path
from voidbus.vm.guest.frames import MessageType, ProtocolError
from voidbus.vm.guest.handshake import Flags
from voidbus.vm.guest.outcome import Outcome, decode_outcome
from voidbus.vm.guest.paths import names_of
from voidbus.vm.multiplexer import Multiplexer, Slot, guarded


class FileWatching(Multiplexer):
    """A multiplexer with ``watch_file``. ``_end_watching`` ends what runs on this side for it."""

    poll_seconds: ClassVar[float] = 1.0
    """Between two questions for a file of a guest that can't tell by itself."""

    def __init__(
        self, connected: Connected, on_lost: Callable[[ChannelFault], None] | None, name: str
    ) -> None:
        super().__init__(connected, on_lost, name)
        self._poller: FilePoller | None = None

    def watch_file(self, path: str, on_change: Callable[[FileStat], None], timeout: float) -> None:
        """Be told of a file for as long as the channel lasts: at once when it is there and not
        empty, and whenever it is complete anew (closed by a writer, moved to its name, or
        linked to it with content), at most 20 times a second; the last time is always told.
        Its directory need not be there. ``on_change`` runs on the reader thread.

        A guest that can't tell is asked once a second: then the file counts as complete when
        two answers in a row say the same size, and one of the same size as before is not seen.

        Returns when the guest watches. Raises ChannelFault; REFUSED for a path outside the
        guest's roots, or one file too many.
        """
        self._refuse_on_reader()
        if Flags.WATCH_FILES in self.flags:
            self._watch_by_notice(path, on_change, timeout)
        else:
            self._watch_by_asking(path, on_change)

    def _watch_by_notice(
        self, path: str, on_change: Callable[[FileStat], None], timeout: float
    ) -> None:
        finished = threading.Event()
        outcomes: list[Outcome | ChannelFault] = []

        def answered(body: bytes) -> None:
            if outcomes:
                raise ProtocolError(f"a second answer to {slot.what}")
            outcomes.append(decode_outcome(body))
            slot.deadline = None  # from here on it lasts
            finished.set()

        def fault(reason: ChannelFault) -> None:
            if not outcomes:
                outcomes.append(reason)
            finished.set()

        slot = Slot(
            MessageType.WATCH_FILE_RESPONSE,
            time.monotonic() + timeout,
            answered,
            fault,
            lambda body: guarded(on_change, decode_file_changed(body)),
            MessageType.FILE_CHANGED,
            lasting=True,
            what=f"watch of {path}",
        )
        request_id = self._begin(slot, MessageType.WATCH_FILE, encode_path(path))
        finished.wait()  # the slot's own deadline ends it
        outcome = outcomes[0]
        if isinstance(outcome, ChannelFault):
            raise outcome
        if not outcome.success:
            with self._lock:
                self._slots.pop(request_id, None)
            detail = f"{slot.what}: {outcome.error or 'no reason given'}"
            raise ChannelFault(FaultReason.REFUSED, detail)

    def _watch_by_asking(self, path: str, on_change: Callable[[FileStat], None]) -> None:
        try:
            names_of(path)  # such a guest answers for any path
        except ValueError as error:
            raise ChannelFault(FaultReason.REFUSED, f"watch of {path}: {error}") from None
        with self._lock:
            if self._ended is not None:
                raise ChannelFault(self._ended.reason, self._ended.detail)
            if self._poller is None:
                self._poller = FilePoller(self._begin, self.poll_seconds, f"{self._name}-poll")
        self._poller.add(path, on_change)

    def _end_watching(self) -> None:
        # Whoever made one saw that the channel had not ended, under the lock that ends it.
        with self._lock:
            poller = self._poller
        if poller is not None:
            poller.close()
