"""YAML text to a tree of nodes with positions.

The tree is built from the parser's events and not by PyYAML's composer: the composer recurses
without a limit, drops duplicate keys in silence and applies YAML 1.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import yaml

from voidbus.spec.node import (
    MAX_DEPTH,
    MAX_NODES,
    Entry,
    Node,
    mapping,
    sequence,
    too_deep,
    too_many,
)
from voidbus.spec.problem import Position, Problem, SpecError, field_path
from voidbus.spec.scalar import resolve

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT_TAG = "tag:yaml.org,2002:str"
_CORE_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "map", "seq")
)


class _Mark(Protocol):
    line: int
    column: int


def parse_yaml(text: str, source: str) -> Node:
    """The one document in `text`. Raises SpecError, and nothing else, for anything that isn't
    one YAML document within the limits."""
    try:
        return _Reader(source, text).document()
    except yaml.reader.ReaderError as error:
        raise _unreadable(error, text, source) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = (
            Position(source, mark.line + 1, mark.column + 1) if mark else Position(source, 1, 1)
        )
        said = ", ".join(part for part in (error.context, error.problem) if part)
        if "nesting depth" in said:  # libyaml's own limit may come before ours
            raise too_deep(position) from None
        raise SpecError([Problem(position, "", f"not YAML: {said}")]) from None
    except yaml.YAMLError:
        raise SpecError([Problem(Position(source, 1, 1), "", "not YAML")]) from None


def _unreadable(error: yaml.reader.ReaderError, text: str, source: str) -> SpecError:
    # The C parser counts bytes, the Python one characters; the byte count is turned back.
    before = text.encode()[: error.position].decode(errors="ignore")
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    message = "not YAML: a character that is not allowed"
    return SpecError([Problem(Position(source, line, column), "", message)])


class _Reader:
    def __init__(self, source: str, text: str) -> None:
        self._source = source
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_LOADER)
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        self._path: list[str | int] = []
        self._seen = 0

    def document(self) -> Node:
        next(self._events)  # stream start
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            raise self._error(Position(self._source, 1, 1), "the file is empty")
        root = self._node(next(self._events))
        next(self._events)  # document end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._error(self._position(event), "more than one document; keep one a file")
        return root

    def _node(self, event: yaml.Event) -> Node:
        position = self._position(event)
        self._seen += 1
        if self._seen > MAX_NODES:
            raise too_many(position)
        if len(self._path) >= MAX_DEPTH:
            raise too_deep(position)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), position)
        if not isinstance(
            event, yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent
        ):
            raise self._error(position, "not YAML: a value was expected")
        self._check_tag(event.tag, position)
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, position)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(position)
        else:
            node = self._mapping(position)
        if event.anchor:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, anchor: str, position: Position) -> Node:
        if anchor not in self._anchors:
            raise self._error(position, f"unknown anchor '{anchor[:60]}'")
        node = self._anchors[anchor]
        if node is None:
            raise self._error(position, f"anchor '{anchor[:60]}' contains itself")
        if len(self._path) + node.depth > MAX_DEPTH:
            raise too_deep(position)
        return node

    def _check_tag(self, tag: str | None, position: Position) -> None:
        if tag not in (None, "!", _TEXT_TAG) and tag not in _CORE_TAGS:
            raise self._error(position, "YAML tags are not used here; remove the tag", tag[:60])

    def _scalar(self, event: yaml.ScalarEvent, position: Position) -> Node:
        text: str = event.value
        if "\0" in text:
            raise self._error(position, "text can't hold a NUL character")
        if not event.style and event.tag not in ("!", _TEXT_TAG):
            return Node(position, value=resolve(text), text=text)
        return Node(position, value=text)

    def _sequence(self, position: Position) -> Node:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            self._path.append(len(items))
            items.append(self._node(event))
            self._path.pop()
        return sequence(position, items)

    def _mapping(self, position: Position) -> Node:
        entries: dict[str, Entry] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key, key_position = self._key(event), self._position(event)
            if key in entries:
                self._path.append(key)
                first = entries[key].key_position
                raise self._error(
                    key_position, f"duplicate field, first given on line {first.line}"
                )
            self._path.append(key)
            entries[key] = Entry(key_position, self._node(next(self._events)))
            self._path.pop()
        return mapping(position, entries)

    def _key(self, event: yaml.Event) -> str:
        position = self._position(event)
        if not isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
            # Refused before it is read: mappings as keys of mappings nest without a path.
            raise self._error(position, "a field name must be text")
        node = self._node(event)
        if node.items is not None or node.entries is not None:
            raise self._error(position, "a field name must be text")
        return node.text if node.text is not None else str(node.value)

    def _position(self, event: yaml.Event) -> Position:
        mark = cast("_Mark", event.start_mark)
        return Position(self._source, mark.line + 1, mark.column + 1)

    def _error(self, position: Position, message: str, found: str | None = None) -> SpecError:
        return SpecError([Problem(position, field_path(tuple(self._path)), message, found)])
