"""Who a message is for: a node on the bus and a receiver in it, written `node/path`."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

NODE_LIMIT = 128
PATH_LIMIT = 256

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*\Z")


class AddressError(ValueError):
    """The text is not an address."""


class Address(NamedTuple):
    """A receiver: `path` inside the process `node`. An empty path means the node itself."""

    node: str
    path: str

    def __str__(self) -> str:
        return f"{self.node}/{self.path}"


def valid_node(name: str) -> bool:
    """Whether `name` can name a node: 1 to 128 letters, digits, `.`, `_`, `-`, none leading."""
    return _NODE.match(name) is not None


@lru_cache(maxsize=4096)
def parse_address(text: str) -> Address:
    """Read `node/path`. Raises AddressError naming what is wrong with the text."""
    node, slash, path = text.partition("/")
    if not slash:
        raise AddressError(f"address {text[:80]!r} has no '/': write it as node/path")
    if not valid_node(node):
        raise AddressError(f"address {text[:80]!r}: {node[:40]!r} cannot name a node")
    if path and (len(path) > PATH_LIMIT or not _PATH.match(path)):
        raise AddressError(f"address {text[:80]!r}: {path[:40]!r} cannot name a receiver")
    return Address(node, path)
