"""The inbox as a resource: read it, or subscribe and be told when something arrives."""

import json
from typing import Any

from voidbus.mcp.jsonrpc import INTERNAL_ERROR, RpcError
from voidbus.mcp.tools import Ask
from voidbus.sidecar.client import Reply, SidecarClientError

INBOX_URI = "void://inbox"

_NEWER_THAN_ANY = 2**64 - 1
READ = Ask("GET", "/v1/inbox")
HEADER = Ask("GET", f"/v1/inbox?since={_NEWER_THAN_ANY}")
"""The inbox's version without its entries."""


def shown(*, structured: bool) -> dict[str, Any]:
    """The inbox's row of `resources/list`."""
    row = {
        "uri": INBOX_URI,
        "name": "inbox",
        "description": "Messages from other agents and from the leader, newest last, as JSON. "
        "Subscribe to be told when something arrives.",
        "mimeType": "application/json",
    }
    return {**row, "title": "Inbox"} if structured else row


def contents(answer: Reply | SidecarClientError) -> dict[str, Any]:
    """The result of `resources/read`. Raises RpcError where the sidecar gave none."""
    text = _text(answer)
    return {"contents": [{"uri": INBOX_URI, "mimeType": "application/json", "text": text}]}


def version(answer: Reply | SidecarClientError) -> int:
    """The version of an inbox that was read. Raises RpcError where the sidecar gave none."""
    try:
        found = json.loads(_text(answer))["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if isinstance(found, bool) or not isinstance(found, int):
        raise RpcError(INTERNAL_ERROR, "the sidecar's answer is no inbox")
    return found


def _text(answer: Reply | SidecarClientError) -> str:
    if isinstance(answer, SidecarClientError):
        raise RpcError(INTERNAL_ERROR, str(answer))
    text = answer.body.decode("utf-8", "replace")
    if answer.status >= 400:
        raise RpcError(INTERNAL_ERROR, f"the sidecar answered HTTP {answer.status}: {text[:500]}")
    return text
