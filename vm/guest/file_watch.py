"""Telling the host of files the moment they are complete, by inotify.

A file is complete when a writer has closed it, when it was moved to its name, or when it was
linked to it with content. Every directory on the way to it is watched too, from the root down
to the last one that is there, so that one which is made, removed or replaced is noticed: then
the way is gone anew. A directory is opened only after the one above is watched, so nothing
happens unseen in between.

What a new directory is found to hold is told at once, whether or not somebody still writes
it; when that is so it is told again at its end.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
from collections.abc import Callable

from . import inotify
from .descent import descend
from .file_messages import MAX_WATCHED, FileStat
from .paths import names_of
from .place import Place

MAX_NAMES = 32
"""Names a watched path may have: each directory on the way takes a watch of the kernel's."""

TOLD_PAUSE = 0.05
"""Seconds between two notices of a file: at most 20 a second."""

READ_PAUSE = 0.005
"""Seconds events are let gather, so that a busy directory does not keep the agent busy."""

RETRY_SECONDS = 1.0
"""How often a way is gone anew that the kernel lets nobody watch."""

_MAX_READS = 128
"""Reads in a row, 64 KiB each: more than the kernel's queue holds (16384 events)."""

_CHANGED = (
    inotify.CREATE
    | inotify.MOVED_TO
    | inotify.MOVED_FROM
    | inotify.DELETE
    | inotify.DELETE_SELF
    | inotify.MOVE_SELF
    | inotify.ONLY_DIRECTORY
    | inotify.EXCLUDE_UNLINKED
    | inotify.MASK_ADD  # two files may have a directory in common
)
_ON_THE_WAY = _CHANGED | inotify.ATTRIB
_HOLDS_THE_FILE = _CHANGED | inotify.OPEN | inotify.CLOSE_WRITE | inotify.CLOSE_NOWRITE
_WATCH_ENDED = inotify.DELETE_SELF | inotify.MOVE_SELF | inotify.UNMOUNT | inotify.IGNORED

_Identity = tuple[int, int, int, int]


class _File:
    """What is known of one watched file, and what is to be done about it."""

    def __init__(self, number: int, names: list[str], place: Place) -> None:
        self.number = number
        """The request id the host is told under."""
        start, way = place.start_of(names[:-1])
        self.path = "/" + "/".join(names)
        self.start = start
        self.names = [*way, names[-1]]
        """Those from ``start`` on."""
        self.watches: list[int] = []
        """Those of the directories on the way, in order; fewer than names when some are not
        there."""
        self.told: _Identity | None = None
        self.lost = True
        """The way is to be gone anew."""
        self.retry = False
        self.look = False
        """It may be another than the one told."""
        self.complete = False
        self.linked = False
        """It got its name and nobody has opened it since."""
        self.openings: int | None = None
        """How many have it open of those who opened it since it got its name; None when that
        is of no account."""

    def take(self, event: inotify.Event) -> None:
        for depth, watch in enumerate(self.watches):
            if watch != event.watch:
                continue
            if event.mask & _WATCH_ENDED:
                self.lost = True
            elif depth < len(self.names) and event.name == self.names[depth]:
                if depth == len(self.names) - 1:
                    self._take_own(event.mask)
                elif event.mask & _ON_THE_WAY:
                    self.lost = True

    def _take_own(self, mask: int) -> None:
        if mask & (inotify.CLOSE_WRITE | inotify.MOVED_TO):
            self.complete = True
            self.linked, self.openings = False, None
        elif mask & inotify.CREATE:
            self.linked, self.openings = True, 0
        elif mask & inotify.OPEN and self.openings is not None:
            # By who made it, and then it is not complete before that one closes it; or it was
            # linked and this is a reader, after whom nobody has it open.
            self.linked, self.openings = False, self.openings + 1
        elif mask & inotify.CLOSE_NOWRITE and self.openings is not None:
            self.openings -= 1
            self.look = self.look or self.openings <= 0
        elif mask & (inotify.DELETE | inotify.MOVED_FROM):
            self.linked, self.openings = False, None
            self.told = None


class FileWatcher:
    """The watched files of one connection. ``tell`` and ``answer`` are called on a thread of
    its own: for each file first ``answer`` with None or why it is not watched, then ``tell``
    for each time it is complete. An OSError from either ends the watching.

    Raises OSError when the kernel gives no inotify instance.
    """

    def __init__(
        self,
        place: Place,
        answer: Callable[[int, str | None], None],
        tell: Callable[[int, FileStat], None],
    ) -> None:
        self._place = place
        self._answer = answer
        self._tell = tell
        self._lock = threading.Lock()
        self._asked: list[_File] = []
        self._files: list[_File] = []
        self._count = 0
        self._closing = threading.Event()
        self._inotify = inotify.Inotify()
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._inotify.close()
            raise
        self._thread = threading.Thread(target=self._run, name="file-watch", daemon=True)
        self._thread.start()

    def add(self, number: int, path: str) -> None:
        """Watch a file from now on. Raises ValueError when that is not allowed."""
        names = names_of(path)
        if "\0" in path or path.endswith("/"):
            raise ValueError(f"{path!r} is not the name of a file")
        if len(names) > MAX_NAMES:
            raise ValueError(f"{path}: deeper than {MAX_NAMES} names, so it can't be watched")
        with self._lock:
            if self._count >= MAX_WATCHED:
                raise ValueError(f"{MAX_WATCHED} files are watched already; that is the most")
            self._count += 1
            self._asked.append(_File(number, names, self._place))
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread and close every descriptor. A ``tell`` under way must end by itself."""
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._inotify.close()
        os.close(self._wake)

    # -- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while not self._closing.is_set():
                retry = any(file.retry for file in self._files)
                ready = [fd for fd, _ in poll.poll(RETRY_SECONDS * 1000 if retry else None)]
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                    self._take_asked()
                told = self._round()
                self._closing.wait(TOLD_PAUSE if told else READ_PAUSE)
        except OSError:
            return  # the host is gone, and the connection with it

    def _take_asked(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, []
        for file in asked:
            fault = self._follow(file)
            if fault is None:
                self._files.append(file)
            else:
                self._release(file.watches)
                with self._lock:
                    self._count -= 1
            self._answer(file.number, fault)

    def _round(self) -> bool:
        """Read what happened and tell what is complete; whether anything was told."""
        self._read_events()
        for file in self._files:
            if file.lost or file.retry:
                self._follow(file)
        linked = [file for file in self._files if file.linked and _has_content(self._find(file))]
        if linked:
            # A writer's opening is queued before its first byte is seen; without one, the
            # content came with the name.
            drained = self._read_events()
            for file in linked:
                if file.linked and drained:
                    file.linked, file.openings, file.look = False, None, True
        told = [self._tell_of(file) for file in self._files if file.look or file.complete]
        return any(told)

    def _read_events(self) -> bool:
        """Take the events that wait; whether those were all."""
        for _ in range(_MAX_READS):
            events = self._inotify.read()
            if events is None:
                return True
            for event in events:
                for file in self._files:
                    if event.mask & inotify.QUEUE_OVERFLOW:
                        file.lost = file.complete = True
                    else:
                        file.take(event)
        return False

    def _follow(self, file: _File) -> str | None:
        """Watch every directory on the way to a file that is there; what the kernel says if it
        lets us not."""
        watches: list[int] = []
        fault: str | None = None

        def watch(directory: int) -> None:
            last = len(watches) == len(file.names) - 1
            mask = _HOLDS_THE_FILE if last else _ON_THE_WAY
            watches.append(self._inotify.add(directory, mask))

        try:
            with descend(file.start, file.names[:-1], visit=watch):
                pass
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if not (missing and watches):
                fault = f"{file.path}: can't be watched: {error.strerror}"
                if error.errno == errno.ENOSPC:
                    fault += "; fs.inotify.max_user_watches directories are watched already"
        before, file.watches = file.watches, watches
        self._release(before)
        file.lost, file.retry, file.look = False, fault is not None, True
        return fault

    def _release(self, watches: list[int]) -> None:
        used = {watch for file in self._files for watch in file.watches}
        for watch in set(watches) - used:
            self._inotify.remove(watch)

    def _tell_of(self, file: _File) -> bool:
        found = self._find(file)
        certain, file.complete, file.look = file.complete, False, False
        if found is None:
            file.told = None
            return False
        if not certain and (found == file.told or not _has_content(found)):
            return False
        file.told = found
        self._tell(file.number, FileStat(True, found[2]))
        return True

    def _find(self, file: _File) -> _Identity | None:
        """Device, inode, size and time of a file; None when there is none of that name."""
        try:
            with descend(file.start, file.names[:-1]) as directory:
                found = os.stat(file.names[-1], dir_fd=directory, follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _has_content(found: _Identity | None) -> bool:
    return found is not None and found[2] > 0
