"""claudio's side of the Model Context Protocol: a client of servers on streamable HTTP.

As much of it as an agent needs: initialize, list the tools, call some. Standard library only, and
no http.client, which would load most of what claudio loads.
"""

import json
import socket
from typing import Any

PROTOCOL = "2025-06-18"
DEADLINE = 20.0  # seconds for one request
MAX_ANSWER_BYTES = 8 * 1024 * 1024


class McpError(Exception):
    """A server can't be reached, or does not answer as the protocol says."""


class McpClient:
    """One session with one server. Raises McpError."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        authority, slash, path = rest.partition("/")
        host, _, port = authority.partition(":")
        if scheme != "http" or not port.isdigit():
            raise McpError(f"{url} is no http://HOST:PORT/PATH")
        self._address = (host, int(port))
        self._path = slash + path or "/"
        self._session: str | None = None
        self._serial = 0
        info = {"name": "claudio", "version": "1"}
        self._ask(
            "initialize", {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": info}
        )
        self._post({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def tools(self) -> list[str]:
        """The names of its tools."""
        return [str(tool["name"]) for tool in self._ask("tools/list", {})["tools"]]

    def call(self, tool: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        """Call a tool: whether it succeeded, and the text it answered."""
        result = self._ask("tools/call", {"name": tool, "arguments": arguments})
        texts = [str(part.get("text", "")) for part in result.get("content", [])]
        return not result.get("isError"), "\n".join(texts)

    def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._serial += 1
        request = {"jsonrpc": "2.0", "id": self._serial, "method": method, "params": params}
        answer = self._post(request)
        if not isinstance(answer, dict) or not isinstance(answer.get("result"), dict):
            error = answer.get("error") if isinstance(answer, dict) else answer
            raise McpError(f"{method}: {json.dumps(error)}")
        return dict(answer["result"])

    def _post(self, message: dict[str, Any]) -> Any:
        body = json.dumps(message).encode()
        lines = [
            f"POST {self._path} HTTP/1.1",
            f"Host: {self._address[0]}:{self._address[1]}",
            "Content-Type: application/json",
            "Accept: application/json, text/event-stream",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if self._session is not None:
            lines += [f"Mcp-Session-Id: {self._session}", f"MCP-Protocol-Version: {PROTOCOL}"]
        try:
            with socket.create_connection(self._address, timeout=DEADLINE) as connection:
                connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
                answer = _read_all(connection)
        except OSError as error:
            raise McpError(f"can't reach {self._address[0]}:{self._address[1]}: {error}") from error
        return self._content(answer)

    def _content(self, answer: bytes) -> Any:
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *fields = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (field.partition(":") for field in fields)
        }
        self._session = headers.get("mcp-session-id", self._session)
        status = first.split(" ")[1] if first.count(" ") else first
        if status == "202":
            return None
        if status != "200":
            raise McpError(f"HTTP status {status}: {body[:200].decode(errors='replace')}")
        try:
            return json.loads(body)
        except ValueError as error:
            raise McpError(f"the answer is no JSON: {error}") from error


def _read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts: list[bytes] = []
    size = 0
    while data := connection.recv(65536):
        parts.append(data)
        size += len(data)
        if size > MAX_ANSWER_BYTES:
            raise OSError(f"the answer is over {MAX_ANSWER_BYTES} bytes")
    return b"".join(parts)
