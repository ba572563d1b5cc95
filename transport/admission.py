"""Who may join a hub, under which name, and what it may then send."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from voidbus.transport.address import valid_node
from voidbus.transport.control import Hello
from voidbus.transport.envelope import Envelope
from voidbus.transport.link import Link
from voidbus.transport.message import Right, UnknownType, message_type

# A client names itself; a run process is expected by name.
CLIENT_PREFIX = "client-"


@dataclass(frozen=True)
class ExpectedNode:
    """A node that may join by the work endpoint: the SHA-256 of its token, and its generation."""

    token_digest: bytes
    generation: int


def token_digest(token: str) -> bytes:
    """What a hub keeps of a token: enough to know it again, not to use it."""
    return hashlib.sha256(token.encode()).digest()


class Admission:
    """Decides on HELLOs. `is_open` False: who may come by the work endpoint is yet to be read."""

    def __init__(self, hub: str, instance: int, *, is_open: bool) -> None:
        self._hub = hub
        self._instance = instance
        self.is_open = is_open
        self.expected: dict[str, ExpectedNode] = {}

    def refusal(self, hello: Hello, right: Right, present: Hello | None) -> str | None:
        """Why `hello` is not let in; None where it is. `present` has its name now."""
        if not valid_node(hello.node) or hello.node == self._hub:
            return "that name cannot be a node's"
        if hello.instance == self._instance:
            return "that instance number is the hub's"
        if right is Right.WORK:
            return self._work_refusal(hello)
        if not hello.node.startswith(CLIENT_PREFIX):
            return f"a node on this endpoint is named {CLIENT_PREFIX}..."
        # The instance number travels in every ask, so it proves nothing; the token does.
        if present is not None and (
            present.instance != hello.instance or not _same(token_digest(present.token), hello)
        ):
            return "a client of that name is connected"
        return None

    def _work_refusal(self, hello: Hello) -> str | None:
        expected = self.expected.get(hello.node)
        if expected is None:
            return f"{hello.node} is not expected"
        if not _same(expected.token_digest, hello):
            return f"{hello.node}: the token is wrong"
        if expected.generation != hello.generation:
            return (
                f"{hello.node}: generation {hello.generation} has been replaced by "
                f"{expected.generation}"
            )
        return None


def message_refusal(envelope: Envelope, target: str, link: Link, hub: str) -> str | None:
    """Why `hub` takes no such ASK or TELL for `target` by `link`; None where it does."""
    if link.right is Right.WORK and target not in (hub, link.node):
        return "a run's node may address only the supervisor and itself"
    try:
        needed = message_type(envelope.tag, envelope.version).right
    except UnknownType:
        return None  # the receiver says so, and in better words
    if needed is None:
        return f"{envelope.tag} is sent inside a process only"
    if not link.right.allows(needed):
        return (
            f"{envelope.tag} needs the {needed.name.lower()} endpoint; "
            f"this link came by {link.right.name.lower()}"
        )
    return None


def _same(digest: bytes, hello: Hello) -> bool:
    return hmac.compare_digest(digest, token_digest(hello.token))
