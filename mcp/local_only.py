"""Who may speak to a server on the loopback: not a web page that a browser of the same machine
has open, which the Origin and Host headers give away (MCP: Transports, Security Warning)."""

from voidbus.mcp.http_wire import HttpFault

_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def check_local(headers: dict[str, str]) -> None:
    """Raises HttpFault (403) for a request from elsewhere, or for a name that is not ours."""
    origin = headers.get("origin")
    if origin is not None and not _is_local(origin.partition("://")[2]):
        raise HttpFault(403, "this server is for programs of its own machine: Origin is refused")
    # A page whose name leads to 127.0.0.1 ("DNS rebinding") sends its own name as Host.
    host = headers.get("host")
    if host is not None and not _is_local(host):
        raise HttpFault(403, "this server is 127.0.0.1: Host is refused")


def _is_local(authority: str) -> bool:
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):  # no port, or the colons of an address
        host, port = authority, "0"
    return host.lower() in _LOCAL and port.isascii() and port.isdigit()
