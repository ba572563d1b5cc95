"""A parsed document as a tree that remembers where each value stood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from voidbus.spec.problem import Location, Position, Problem, SpecError

# A run specification nests about 8 deep (pipeline.boxes[0].skills[0].env.KEY); 64 leaves room and
# keeps every recursive walk far from Python's recursion limit (1000).
MAX_DEPTH = 64
# Nodes after aliases are expanded, so a few kilobytes of anchors can't become gigabytes.
MAX_NODES = 50_000

Scalar = str | int | float | bool | None
Plain = Scalar | tuple["Plain", ...] | dict[str, "Plain"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of a mapping: where its key stood, and its value."""

    key_position: Position
    node: Node


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a sequence (`items`) or a mapping (`entries`).

    `text` is the source text of an unquoted YAML scalar or an environment variable: where text is
    wanted, `8080` may stand for `"8080"`. `size` counts nodes with aliases expanded.
    """

    position: Position
    value: Scalar = None
    items: tuple[Node, ...] | None = None
    entries: dict[str, Entry] | None = None
    text: str | None = None
    size: int = 1
    depth: int = 1

    def plain(self) -> Plain:
        """The data alone: scalars, tuples and dicts."""
        if self.entries is not None:
            return {key: entry.node.plain() for key, entry in self.entries.items()}
        if self.items is not None:
            return tuple(item.plain() for item in self.items)
        return self.value

    def child(self, part: str | int) -> Node | None:
        if isinstance(part, str) and self.entries is not None:
            entry = self.entries.get(part)
            return entry.node if entry else None
        if isinstance(part, int) and self.items is not None and 0 <= part < len(self.items):
            return self.items[part]
        return None

    def at(self, location: Location) -> Node | None:
        node: Node | None = self
        for part in location:
            if node is None:
                return None
            node = node.child(part)
        return node

    def position_of(self, location: Location) -> Position:
        """Where the value at `location` stands, or the nearest thing around it that exists."""
        node = self
        for part in location:
            inner = node.child(part)
            if inner is None:
                break
            node = inner
        return node.position

    def key_position_of(self, location: Location) -> Position:
        """Where the key at `location` stands; for a list item, where the item does."""
        parent = self.at(location[:-1])
        if location and parent is not None and parent.entries is not None:
            entry = parent.entries.get(str(location[-1]))
            if entry is not None:
                return entry.key_position
        return self.position_of(location)

    def with_value(self, location: Location, node: Node) -> Node:
        """This tree with `node` at `location`; mappings missing on the way are made."""
        return self.with_values({location: node})

    def with_values(self, values: Mapping[Location, Node]) -> Node:
        """This tree with each node at its location; mappings missing on the way are made, and take
        the place of scalars (`tcp: null`). Locations don't lie inside one another."""
        if () in values:
            return values[()]
        inner: dict[str | int, dict[Location, Node]] = {}
        for location, node in values.items():
            inner.setdefault(location[0], {})[location[1:]] = node
        if self.items is not None:
            items = list(self.items)
            for part, deeper in inner.items():
                if isinstance(part, int):
                    items[part] = items[part].with_values(deeper)
            return replace(self, items=tuple(items))
        entries = dict(self.entries or {})
        for part, deeper in inner.items():
            position = next(iter(deeper.values())).position
            entry = entries.get(str(part)) or Entry(position, Node(position, entries={}))
            entries[str(part)] = Entry(entry.key_position, entry.node.with_values(deeper))
        return replace(self, entries=entries, value=None, text=None)


def sequence(position: Position, items: list[Node]) -> Node:
    size, depth = _measure(position, items)
    return Node(position, items=tuple(items), size=size, depth=depth)


def mapping(position: Position, entries: dict[str, Entry]) -> Node:
    size, depth = _measure(position, [entry.node for entry in entries.values()])
    return Node(position, entries=entries, size=size, depth=depth)


def too_deep(position: Position) -> SpecError:
    return SpecError(
        [Problem(position, "", "nested too deeply", allowed=f"at most {MAX_DEPTH} levels")]
    )


def too_many(position: Position) -> SpecError:
    message = "too many values (aliases count each time they are used)"
    return SpecError([Problem(position, "", message, allowed=f"at most {MAX_NODES}")])


def _measure(position: Position, children: list[Node]) -> tuple[int, int]:
    size = 1 + sum(child.size for child in children)
    depth = 1 + max((child.depth for child in children), default=0)
    if size > MAX_NODES:
        raise too_many(position)
    if depth > MAX_DEPTH:
        raise too_deep(position)
    return size, depth
