"""A small HTTP client for the sidecar, shared by the tools that run in a guest.

Standard library only, and no import of its own package: in a guest this file is copied next
to the tools that use it. It reads HTTP/1.1 (RFC 9112) by itself, because http.client brings
email and ssl with it, which is most of what such a tool would load; and it has no dataclass,
because that loads inspect.
"""

import socket
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

URL_VARIABLE = "VOID_SIDECAR_URL"
CONNECT_TIMEOUT = 5.0  # seconds
READ_TIMEOUT = 10.0  # seconds, from the request's first byte to the answer's last
MAX_RESPONSE_BYTES = 8 * 1024 * 1024  # twice the largest inbox a sidecar holds
MAX_HEAD_BYTES = 65536  # of an answer's status line and headers

POLL_SECONDS = 25.0
"""How long one question for signals waits at the sidecar."""


class SidecarClientError(Exception):
    """The sidecar's URL is wrong, or it can't be reached, or its answer can't be read."""


class Cancelled(SidecarClientError):
    """The request was ended by its `Abort`."""


class Reply(NamedTuple):
    """An HTTP answer of any status; `body` is as it came."""

    status: int
    body: bytes


class Abort:
    """Lets another thread end a request: at once while it runs, else when it begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.asked = False

    def cancel(self) -> None:
        """End the request; it raises Cancelled. May be called from any thread, at any time."""
        with self._lock:
            self.asked = True
            if self._connection is not None:
                _shut(self._connection)

    def hold(self, connection: socket.socket | None) -> None:
        """The connection `cancel` has to end from now on. Raises Cancelled where it was asked."""
        with self._lock:
            self._connection = connection
            if self.asked and connection is not None:
                raise Cancelled("the request was cancelled")


class SidecarClient:
    """Speaks to the sidecar at `url`: `http://IP:PORT`, the IP literal."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
    ) -> None:
        self.host, self.port = parse_url(url)
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "SidecarClient":
        """The client for VOID_SIDECAR_URL. Raises SidecarClientError where it is not set."""
        url = environ.get(URL_VARIABLE)
        if not url:
            raise SidecarClientError(f"{URL_VARIABLE} not set")
        return cls(url)

    def signals(
        self, since: int | None, abort: Abort | None = None, *, seconds: float = POLL_SECONDS
    ) -> Reply:
        """Wait for news of the inbox since a version (None: everything), for so long at most.

        The answer has the inbox's header, and the new entries or none. Raises as `request` does.
        """
        path = f"/v1/signals?timeout={seconds:g}"
        if since is not None:
            path += f"&since={since}"
        return self.request("GET", path, abort=abort, patience=seconds)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        abort: Abort | None = None,
        patience: float = 0.0,
    ) -> Reply:
        """Send one request and read its whole answer.

        `patience` is how many seconds the sidecar may wait by itself before it answers; they
        are added to the read timeout.

        Raises SidecarClientError when that takes longer than the timeouts, or fails, and
        Cancelled when `abort` ends it.
        """
        abort = abort or Abort()
        timeout = self._read_timeout + patience
        where = f"the sidecar at {self.host}:{self.port}"
        try:
            connection = socket.create_connection(
                (self.host, self.port), timeout=self._connect_timeout
            )
        except OSError as error:
            raise SidecarClientError(f"can't connect to {where}: {error}") from error
        with connection:
            try:
                abort.hold(connection)
                connection.settimeout(timeout)
                connection.sendall(self._request_bytes(method, path, body, headers or {}))
                return _Answer(connection, time.monotonic() + timeout).read()
            except TimeoutError as error:
                raise SidecarClientError(f"{where} did not answer within {timeout:g} s") from error
            except (OSError, EOFError, ValueError) as error:
                if abort.asked:
                    raise Cancelled("the request was cancelled") from error
                raise SidecarClientError(
                    f"{where} gave no answer that can be read: {error!r}"
                ) from error
            finally:
                abort.hold(None)

    def _request_bytes(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + (body or b"")


def parse_url(url: str) -> tuple[str, int]:
    """The IP and port of `http://IP:PORT` or `http://IP:PORT/`.

    Raises SidecarClientError for anything else. A host name is refused: a guest without a
    network has no resolver, and one with a network should not ask it where its sidecar is.
    """
    problem = SidecarClientError(f"{URL_VARIABLE} must be http://IP:PORT, not {url!r}")
    scheme, separator, rest = url.partition("://")
    host, colon, port = rest.removesuffix("/").rpartition(":")
    if scheme != "http" or not separator or not colon:
        raise problem
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise problem
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):
        raise problem from None
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise problem
    return host, int(port)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side was quicker
        return


class _Answer:
    """Reads one answer from a connection that closes after it, all within one deadline.

    A socket's own timeout starts anew with every byte, so a server that sends one now and
    then could hold the reader for ever.

    `read` raises ValueError for bytes that are no HTTP, EOFError where it ends too soon,
    TimeoutError and OSError of the socket, and SidecarClientError past MAX_RESPONSE_BYTES.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._buffer = bytearray()

    def read(self) -> Reply:
        """The whole answer."""
        status, headers = self._head()
        while 100 <= status < 200:
            status, headers = self._head()
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return Reply(status, self._chunks())
        if "content-length" in headers:
            size = _number(headers["content-length"], 10)
            _refuse_over_limit(size)
            return Reply(status, self._exactly(size))
        _refuse_over_limit(len(self._buffer))
        while self._more():
            _refuse_over_limit(len(self._buffer))
        return Reply(status, bytes(self._buffer))

    def _head(self) -> tuple[int, dict[str, str]]:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ValueError(f"its headers are over {MAX_HEAD_BYTES} bytes")
            self._need_more()
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"it begins with {first[:40]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return _number(rest[:3], 10), headers

    def _chunks(self) -> bytes:
        body = bytearray()
        while size := _number(self._line().partition(b";")[0].decode("latin-1").strip(), 16):
            _refuse_over_limit(len(body) + size)
            body += self._exactly(size)
            self._line()
        return bytes(body)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ValueError("a line of it has no end")
            self._need_more()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._need_more()
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def _need_more(self) -> None:
        if not self._more():
            raise EOFError("it ended too soon")

    def _more(self) -> bool:
        """Add what has come to the buffer; whether anything had before the end."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        data = self._connection.recv(65536)
        self._buffer += data
        return bool(data)


def _number(text: str, base: int) -> int:
    # int() would take signs, blanks and underscores too.
    if not text or len(text) > 20 or not set(text.lower()) <= set("0123456789abcdef"[:base]):
        raise ValueError(f"{text[:20]!r} is no number")
    return int(text, base)


def _refuse_over_limit(size: int) -> None:
    if size > MAX_RESPONSE_BYTES:
        raise SidecarClientError(
            f"the sidecar's answer is over {MAX_RESPONSE_BYTES} bytes; ask for less with --since"
        )
