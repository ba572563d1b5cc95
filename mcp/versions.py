"""Versions of the Model Context Protocol, and what changes between them.

The specification has two eras. Up to 2025-11-25 a client begins with `initialize`, which
settles the version for the connection. Since 2026-07-28 there is no such handshake: every
request carries its version and the client's capabilities in `params._meta`
(https://modelcontextprotocol.io/specification/2026-07-28/changelog).
"""

from collections.abc import Mapping
from typing import Any

from voidbus.mcp.jsonrpc import INVALID_PARAMS, RpcError

HANDSHAKE = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
STATELESS = ("2026-07-28",)
SUPPORTED = (*HANDSHAKE, *STATELESS)

ASSUMED = "2025-03-26"
"""The version of a client that has named none: the specification's transports page says so for
HTTP, and clients that never initialize are older still, which makes no difference to us."""

UNSUPPORTED_VERSION = -32022
"""The error that names the versions there are (2026-07-28)."""

_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"
_SERVER_KEY = "io.modelcontextprotocol/serverInfo"
SUBSCRIPTION_KEY = "io.modelcontextprotocol/subscriptionId"


def negotiate(asked: Any) -> str:
    """The answer to the version `initialize` asks for: the same, or our newest of that era."""
    return asked if asked in HANDSHAKE else HANDSHAKE[-1]


def has_structure(version: str) -> bool:
    """Whether results may be structured and schemas tell of them (since 2025-06-18)."""
    return version not in ("2024-11-05", "2025-03-26")


def unsupported(asked: Any) -> RpcError:
    """The error for a version we do not speak."""
    shown = asked[:64] if isinstance(asked, str) else None
    return RpcError(
        UNSUPPORTED_VERSION,
        "Unsupported protocol version",
        {"supported": list(SUPPORTED), "requested": shown},
    )


def stateless_version(params: Mapping[str, Any]) -> str | None:
    """The version a request carries in itself; None where it does not, as before 2026-07-28.

    Raises RpcError where what it carries is incomplete, or a version we do not speak.
    """
    meta = params.get("_meta")
    if not isinstance(meta, dict) or _VERSION_KEY not in meta:
        return None
    version = meta[_VERSION_KEY]
    if not isinstance(version, str):
        raise RpcError(INVALID_PARAMS, f"params._meta[{_VERSION_KEY!r}] must be a string")
    if version not in STATELESS:
        raise unsupported(version)
    if not isinstance(meta.get(_CAPABILITIES_KEY), dict):
        raise RpcError(INVALID_PARAMS, f"params._meta[{_CAPABILITIES_KEY!r}] must be an object")
    return version


def stamp(
    result: dict[str, Any], server: dict[str, Any], *, lifetime_ms: int | None = None
) -> dict[str, Any]:
    """A result as 2026-07-28 wants it: complete, with who answers, and how long it may be kept."""
    stamped = {"resultType": "complete", **result}
    stamped["_meta"] = {**result.get("_meta", {}), _SERVER_KEY: server}
    if lifetime_ms is not None:
        stamped |= {"ttlMs": lifetime_ms, "cacheScope": "private"}
    return stamped
