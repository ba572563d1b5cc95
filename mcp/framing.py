"""Where messages begin and end on standard input.

MCP's stdio transport has a message on each line. Clients of the first void-mcp, and of language
servers, send `Content-Length: N`, a blank line and N bytes instead. Either is read, message by
message, and answered in kind.
"""

from typing import NamedTuple

from voidbus.mcp.jsonrpc import MAX_MESSAGE_BYTES

MAX_HEADER_BYTES = 4096
"""A header before a message, at most."""

_BLANK = b" \t\r\n"
_LENGTH = b"content-length"
_HEADERS = (_LENGTH, b"content-type")


class Frame(NamedTuple):
    """A message's bytes, and whether a header told their length."""

    data: bytes
    has_header: bool


class Unreadable(NamedTuple):
    """What was passed over, and why."""

    why: str
    has_header: bool


def wrap(data: bytes, *, has_header: bool) -> bytes:
    """An answer, framed as its client frames what it sends."""
    if has_header:
        return b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    return data + b"\n"


class FrameDecoder:
    """Takes bytes as they arrive; holds one message and a header at most."""

    def __init__(self, limit: int = MAX_MESSAGE_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0  # how much of the buffer holds no line's end
        self._skip = 0  # bytes of a body that is too long
        self._skip_line = False  # the rest of a line that is too long

    def feed(self, data: bytes) -> list[Frame | Unreadable]:
        """What is complete with these bytes. Nothing is raised."""
        found: list[Frame | Unreadable] = []
        for start in range(0, len(data), self._limit):
            self._buffer += data[start : start + self._limit]
            while (one := self._next()) is not None:
                found.append(one)
        return found

    def end(self) -> list[Frame | Unreadable]:
        """What the end of the input completes: a last line without a line's end."""
        rest = bytes(self._buffer).strip(_BLANK)
        self._buffer.clear()
        if not rest or self._skip_line:
            return []
        if self._begins_header(rest):
            return [Unreadable("the input ended within a message", has_header=True)]
        return [Frame(rest, has_header=False)]

    def _next(self) -> Frame | Unreadable | None:
        self._pass_over()
        if not self._buffer or self._skip or self._skip_line:
            return None
        if self._begins_header(self._buffer):
            return self._framed()
        return self._line()

    def _pass_over(self) -> None:
        if self._skip:
            gone = min(self._skip, len(self._buffer))
            del self._buffer[:gone]
            self._skip -= gone
        if self._skip_line:
            end = self._buffer.find(b"\n")
            self._skip_line = end < 0
            del self._buffer[: end + 1 if end >= 0 else len(self._buffer)]
        if not self._searched:
            blank = len(self._buffer) - len(self._buffer.lstrip(_BLANK))
            del self._buffer[:blank]

    def _begins_header(self, data: bytes | bytearray) -> bool:
        """Whether a header begins here, or may once more bytes have come."""
        start = bytes(data[:16]).lower()
        return any(start.startswith(name[: len(start)]) for name in _HEADERS) if start else False

    def _line(self) -> Frame | Unreadable | None:
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            if self._searched <= self._limit:
                return None
            self._searched = 0
            self._buffer.clear()
            self._skip_line = True
            return Unreadable(f"a message is over {self._limit} bytes", has_header=False)
        self._searched = 0
        line = bytes(self._buffer[:end]).rstrip(_BLANK)
        del self._buffer[: end + 1]
        if end > self._limit:
            return Unreadable(f"a message is over {self._limit} bytes", has_header=False)
        return Frame(line, has_header=False)

    def _framed(self) -> Frame | Unreadable | None:
        head, body = self._header_end()
        if body < 0:
            if len(self._buffer) < MAX_HEADER_BYTES:
                return None
            del self._buffer[:MAX_HEADER_BYTES]
            self._skip_line = True
            return Unreadable(f"a header is over {MAX_HEADER_BYTES} bytes", has_header=True)
        length = _length(bytes(self._buffer[:head]))
        if length is None:
            del self._buffer[:body]
            return Unreadable("a header names no Content-Length", has_header=True)
        if length > self._limit:
            del self._buffer[:body]
            self._skip = length
            return Unreadable(f"a message is over {self._limit} bytes", has_header=True)
        if len(self._buffer) < body + length:
            return None
        data = bytes(self._buffer[body : body + length])
        del self._buffer[: body + length]
        return Frame(data, has_header=True)

    def _header_end(self) -> tuple[int, int]:
        """Where the header ends and where the body begins; the body at -1 while it does not."""
        ends = []
        for blank in (b"\r\n\r\n", b"\n\n"):
            at = self._buffer.find(blank, 0, MAX_HEADER_BYTES)
            if at >= 0:
                ends.append((at, at + len(blank)))
        return min(ends, default=(-1, -1))


def _length(header: bytes) -> int | None:
    for line in header.splitlines():
        name, _, value = line.partition(b":")
        digits = value.strip()
        # Twelve digits are far past any limit, and no work to read.
        if name.strip().lower() == _LENGTH and digits.isdigit() and len(digits) <= 12:
            return int(digits)
    return None
