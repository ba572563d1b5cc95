"""HTTP/1.1 requests out of bytes (RFC 9112), for a server of one endpoint. No I/O."""

from typing import NamedTuple

from voidbus.mcp.jsonrpc import MAX_MESSAGE_BYTES

MAX_HEAD_BYTES = 16384
"""A request line and its headers, at most."""

MAX_HEADERS = 100

_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HEX = frozenset(b"0123456789abcdefABCDEF")
_LONGEST_LINE = 256  # of a chunk's size and its extensions
_REASONS = {
    200: "OK",
    202: "Accepted",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    408: "Request Timeout",
    413: "Content Too Large",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class HttpFault(Exception):
    """A request that is refused, with the status and text to answer; the connection ends."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Head(NamedTuple):
    """A request's line and headers; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    keep_alive: bool


class HttpRequest(NamedTuple):
    """A whole request."""

    head: Head
    body: bytes


def response(
    status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, keep_alive: bool
) -> bytes:
    """A whole response; its body is JSON."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
    if body:
        lines.append("Content-Type: application/json")
    lines += [f"Content-Length: {len(body)}", *_lines(headers)]
    lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def stream_head(headers: dict[str, str] | None = None) -> bytes:
    """The head of a response that is a stream of server-sent events, ended by the connection's
    end."""
    lines = [
        "HTTP/1.1 200 OK",
        "Content-Type: text/event-stream",
        "Cache-Control: no-store",
        *_lines(headers),
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def event(data: bytes) -> bytes:
    """A message as a server-sent event; `data` has no line break."""
    return b"event: message\ndata: " + data + b"\n\n"


def _lines(headers: dict[str, str] | None) -> list[str]:
    return [f"{name}: {value}" for name, value in (headers or {}).items()]


class RequestDecoder:
    """One connection's requests, one after the other, out of bytes as they arrive.

    `feed` and `next` raise HttpFault for what is no request, or too long; the connection is not
    to be read from after that.
    """

    def __init__(self, limit: int = MAX_MESSAGE_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._head: Head | None = None
        self._body = bytearray()
        self._left = 0  # bytes of the body, or of its chunk, that are still to come
        self._chunked = False
        self._in_trailer = False
        self.wants_continue = False
        """Whether the client waits for "100 Continue" before it sends the body."""

    @property
    def is_empty(self) -> bool:
        """Whether no request has begun."""
        return self._head is None and not self._buffer

    def feed(self, data: bytes) -> None:
        """Take bytes. What lies behind a request waits here for `next`, bounded."""
        self._buffer += data
        if len(self._buffer) > self._limit + 2 * MAX_HEAD_BYTES:
            raise HttpFault(413, "too much was sent before it was answered")

    def next(self) -> HttpRequest | None:
        """The next request, once it is whole."""
        if self._head is None and not self._read_head():
            return None
        if not (self._read_chunks() if self._chunked else self._read_length()):
            return None
        assert self._head is not None
        request = HttpRequest(self._head, bytes(self._body))
        self._head, self._chunked, self.wants_continue = None, False, False
        self._body.clear()
        return request

    def _read_head(self) -> bool:
        if self._buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: some clients send one too many
            del self._buffer[:2]
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES + 4)
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise HttpFault(431, f"the headers are over {MAX_HEAD_BYTES} bytes")
            return False
        head = _parse_head(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        self._left = _body_length(head.headers, self._limit)
        self._chunked = "transfer-encoding" in head.headers
        self._head = head
        expected = head.headers.get("expect")
        if expected is not None:
            if expected.lower() != "100-continue":
                raise HttpFault(417, "only 100-continue can be expected")
            self.wants_continue = bool(self._left or self._chunked)
        return True

    def _read_length(self) -> bool:
        if len(self._buffer) < self._left:
            return False
        self._take(self._left)
        self._left = 0
        return True

    def _read_chunks(self) -> bool:
        while True:
            if self._left:
                if len(self._buffer) < self._left + 2:
                    return False
                self._take(self._left)
                self._left = 0
                if self._line() != b"":
                    raise HttpFault(400, "a chunk is longer than it says")
            line = self._line()
            if line is None:
                return False
            if self._in_trailer:
                if line == b"":
                    self._in_trailer = False
                    return True
                continue
            size = line.partition(b";")[0].strip()
            if not size or len(size) > 8 or not set(size) <= _HEX:
                raise HttpFault(400, "a chunk's size is no number")
            self._left = int(size, 16)
            self._in_trailer = self._left == 0
            if len(self._body) + self._left > self._limit:
                raise _too_large(self._limit)

    def _take(self, size: int) -> None:
        self._body += self._buffer[:size]
        del self._buffer[:size]

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n", 0, _LONGEST_LINE + 2)
        if end < 0:
            if len(self._buffer) > _LONGEST_LINE:
                raise HttpFault(400, "a line between chunks is too long")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line


def _parse_head(head: bytes) -> Head:
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ")
    if len(words) != 3 or not words[0] or not set(words[0]) <= _TOKEN or not words[1]:
        raise HttpFault(400, "the request line is not METHOD PATH HTTP/1.1")
    method, target, version = words
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise HttpFault(505, "only HTTP/1.1 is spoken here")
    if len(lines) > MAX_HEADERS:
        raise HttpFault(431, f"there are more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        # A blank before the colon, or a folded line, is how requests are smuggled.
        if not colon or not name or not set(name) <= _TOKEN or b"\n" in value or b"\0" in value:
            raise HttpFault(400, "a header is not NAME: VALUE")
        key, text = name.decode("ascii").lower(), value.strip(b" \t\r").decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    if version == b"HTTP/1.1" and "host" not in headers:
        raise HttpFault(400, "the header Host is missing")
    connection = headers.get("connection", "").lower()
    keep = "close" not in connection if version == b"HTTP/1.1" else "keep-alive" in connection
    path = target.partition(b"?")[0].decode("latin-1")
    return Head(method.decode("ascii"), path, headers, keep)


def _body_length(headers: dict[str, str], limit: int) -> int:
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise HttpFault(400, "a body has a length or a coding, not both")
        if coding.lower() != "chunked":
            raise HttpFault(501, "chunked is the only transfer coding here")
        return 0
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit()):
        raise HttpFault(400, "Content-Length is no number")
    if len(length) > 12 or int(length) > limit:
        raise _too_large(limit)
    return int(length)


def _too_large(limit: int) -> HttpFault:
    return HttpFault(413, f"the body is over {limit} bytes")
