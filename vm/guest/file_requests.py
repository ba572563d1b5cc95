"""Answering the file requests of one connection."""

from __future__ import annotations

from collections.abc import Callable

from .file_messages import (
    FileStat,
    decode_path,
    decode_write_file,
    encode_file_content,
    encode_file_stat,
)
from .file_watch import FileWatcher
from .files import Files
from .frames import MAX_PAYLOAD, MessageType
from .handshake import Flags
from .outcome import Outcome, encode_outcome
from .place import Place

_READ_LIMIT_RAW = MAX_PAYLOAD - 4096
_READ_LIMIT_BASE = MAX_PAYLOAD // 4 - 4096

Handler = Callable[[int, bytes], None]


class FileRequests:
    """``send`` puts a frame on the connection and raises OSError when that is over. Requests
    belong to the connection's thread; ``close`` comes after the connection's end."""

    def __init__(
        self, files: Files, place: Place, send: Callable[[MessageType, int, bytes], None]
    ) -> None:
        self._files = files
        self._place = place
        self._send = send
        self._watcher: FileWatcher | None = None

    def handlers(self, flags: Flags) -> dict[MessageType, Handler]:
        """What serves each type of request, for a host with these flags."""
        raw = Flags.RAW_BODIES in flags
        handlers: dict[MessageType, Handler] = {
            MessageType.WRITE_FILE: lambda number, body: self._write(number, body, raw=raw),
            MessageType.MKDIR: self._mkdir,
            MessageType.READ_FILE: lambda number, body: self._read(number, body, raw=raw),
            MessageType.FILE_STAT: self._stat,
        }
        if Flags.WATCH_FILES in flags:
            handlers[MessageType.WATCH_FILE] = self._watch
        return handlers

    def close(self) -> None:
        """Tell of no file any more."""
        if self._watcher is not None:
            self._watcher.close()

    def _write(self, request_id: int, body: bytes, *, raw: bool) -> None:
        outcome = self._files.write(decode_write_file(body, raw=raw))
        self._send(MessageType.WRITE_FILE_RESPONSE, request_id, encode_outcome(outcome))

    def _mkdir(self, request_id: int, body: bytes) -> None:
        outcome = self._files.mkdir(decode_path(body))
        self._send(MessageType.MKDIR_RESPONSE, request_id, encode_outcome(outcome))

    def _read(self, request_id: int, body: bytes, *, raw: bool) -> None:
        limit = _READ_LIMIT_RAW if raw else _READ_LIMIT_BASE
        content = self._files.read(decode_path(body), limit)
        self._send(
            MessageType.READ_FILE_RESPONSE, request_id, encode_file_content(content, raw=raw)
        )

    def _stat(self, request_id: int, body: bytes) -> None:
        found = self._files.stat(decode_path(body))
        self._send(MessageType.FILE_STAT_RESPONSE, request_id, encode_file_stat(found))

    def _watch(self, request_id: int, body: bytes) -> None:
        path = decode_path(body)
        try:
            if self._watcher is None:
                self._watcher = FileWatcher(self._place, self._watching, self._changed)
            self._watcher.add(request_id, path)
        except ValueError as error:
            self._watching(request_id, str(error))
        except OSError as error:
            self._watching(request_id, f"{path}: can't be watched: {error.strerror}")

    def _watching(self, request_id: int, fault: str | None) -> None:
        outcome = Outcome(fault is None, fault)
        self._send(MessageType.WATCH_FILE_RESPONSE, request_id, encode_outcome(outcome))

    def _changed(self, request_id: int, found: FileStat) -> None:
        self._send(MessageType.FILE_CHANGED, request_id, encode_file_stat(found))
