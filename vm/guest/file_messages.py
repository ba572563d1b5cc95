"""Messages of the host's file requests (protocol, "File RPCs")."""

from __future__ import annotations

from typing import NamedTuple

from .bodies import decode_body, encode_body
from .fields import flag, optional_number, optional_text, text
from .frames import ProtocolError

MAX_WATCHED = 16
"""Files one connection may watch."""


class WriteFile(NamedTuple):
    path: str
    content: bytes
    create_parents: bool = True


class FileContent(NamedTuple):
    success: bool
    content: bytes = b""
    error: str | None = None


class FileStat(NamedTuple):
    """``size`` in bytes; ``error`` None and ``exists`` false when the path is not there."""

    exists: bool
    size: int | None = None
    error: str | None = None


def encode_write_file(message: WriteFile, *, raw: bool) -> bytes:
    return encode_body(
        {"path": message.path, "create_parents": message.create_parents},
        {"content": message.content},
        raw=raw,
    )


def decode_write_file(body: bytes, *, raw: bool) -> WriteFile:
    values, data = decode_body(body, ("content",), raw=raw)
    if "content" not in data:
        raise ProtocolError("WriteFile without content")
    return WriteFile(
        text(values, "path"), data["content"], flag(values, "create_parents", default=True)
    )


def encode_path(path: str) -> bytes:
    """The body of MkdirP, ReadFile and FileStat."""
    return encode_body({"path": path})


def decode_path(body: bytes) -> str:
    return text(decode_body(body)[0], "path")


def encode_file_content(message: FileContent, *, raw: bool) -> bytes:
    values = message._asdict()
    return encode_body(values, {"content": values.pop("content")}, raw=raw)


def decode_file_content(body: bytes, *, raw: bool) -> FileContent:
    values, data = decode_body(body, ("content",), raw=raw)
    return FileContent(
        flag(values, "success"), data.get("content", b""), optional_text(values, "error")
    )


def encode_file_stat(message: FileStat) -> bytes:
    return encode_body(message._asdict())


def decode_file_stat(body: bytes) -> FileStat:
    values = decode_body(body)[0]
    return FileStat(
        flag(values, "exists"),
        optional_number(values, "size"),
        optional_text(values, "error"),
    )


def decode_file_changed(body: bytes) -> FileStat:
    """The body of FILE_CHANGED: a FileStat of a file that is there."""
    found = decode_file_stat(body)
    if not found.exists or found.size is None:
        raise ProtocolError("notice of a file that is not there")
    return found
