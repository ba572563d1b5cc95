"""A small HTTP client for the sidecar, shared by the tools that run in a guest.

Standard library only, and no import of its own package: in a guest this file is copied next
to the tools that use it.
"""

import http.client
import io
import ipaddress
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

URL_VARIABLE = "VOID_SIDECAR_URL"
CONNECT_TIMEOUT = 5.0  # seconds
READ_TIMEOUT = 10.0  # seconds, from the request's first byte to the answer's last
MAX_RESPONSE_BYTES = 8 * 1024 * 1024  # twice the largest inbox a sidecar holds


class SidecarClientError(Exception):
    """The sidecar's URL is wrong, or it can't be reached, or its answer can't be read."""


@dataclass(frozen=True)
class Reply:
    """An HTTP answer of any status; `body` is as it came."""

    status: int
    body: bytes


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

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request and read its whole answer.

        Raises SidecarClientError when that takes longer than the timeouts, or fails.
        """
        where = f"the sidecar at {self.host}:{self.port}"
        try:
            connection = socket.create_connection(
                (self.host, self.port), timeout=self._connect_timeout
            )
        except OSError as error:
            raise SidecarClientError(f"can't connect to {where}: {error}") from error
        with connection:
            try:
                return self._exchange(connection, method, path, body, headers or {})
            except TimeoutError as error:
                raise SidecarClientError(
                    f"{where} did not answer within {self._read_timeout:g} s"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                raise SidecarClientError(
                    f"{where} gave no answer that can be read: {error!r}"
                ) from error

    def _exchange(
        self,
        connection: socket.socket,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> Reply:
        reader = _DeadlineSocket(connection, time.monotonic() + self._read_timeout)
        connection.settimeout(self._read_timeout)
        connection.sendall(self._request_bytes(method, path, body, headers))
        with http.client.HTTPResponse(reader, method=method) as response:  # type: ignore[arg-type] # all it uses is makefile()
            response.begin()
            answer = response.read(MAX_RESPONSE_BYTES + 1)
            if len(answer) > MAX_RESPONSE_BYTES:
                raise SidecarClientError(
                    f"the sidecar's answer is over {MAX_RESPONSE_BYTES} bytes; "
                    "ask for less with --since"
                )
            if response.length:  # read(n) gives a body cut short without a word
                raise http.client.IncompleteRead(answer, response.length)
            return Reply(response.status, answer)

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
        ipaddress.ip_address(host)
    except ValueError:
        raise problem from None
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise problem
    return host, int(port)


class _DeadlineSocket:
    """A socket to read from, all reads together within one deadline.

    A socket's own timeout starts anew with every byte, so a server that sends one now and
    then could hold the reader for ever.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client reads its answer from."""
        return io.BufferedReader(_DeadlineReader(self._connection, self._deadline))


class _DeadlineReader(io.RawIOBase):
    def __init__(self, connection: socket.socket, deadline: float) -> None:
        super().__init__()
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)
