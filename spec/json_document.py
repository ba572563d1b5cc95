"""JSON text to a tree of nodes with positions (RFC 8259; the standard library's parser keeps no
positions and lets duplicate keys and NaN pass)."""

from __future__ import annotations

import bisect
import json
import re

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

_BLANK = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*+"')
# 64 characters are past every number the format has; longer ones are refused, not converted.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", re.ASCII)
_WORD = re.compile(r"[a-z]+")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
_MAX_NUMBER = 64


def parse_json(text: str, source: str) -> Node:
    """The one value in `text`. Raises SpecError, and nothing else, for anything that isn't one
    JSON value within the limits."""
    return _Reader(source, text).document()


class _Reader:
    def __init__(self, source: str, text: str) -> None:
        self._source = source
        self._text = text
        self._at = 0
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._path: list[str | int] = []
        self._seen = 0

    def document(self) -> Node:
        if not self._peek():
            raise self._error("the file is empty")
        root = self._value()
        if self._peek():
            raise self._error("not JSON: nothing may follow the value")
        return root

    def _value(self) -> Node:
        first = self._peek()
        position = self._position()
        self._seen += 1
        if self._seen > MAX_NODES:
            raise too_many(position)
        if len(self._path) >= MAX_DEPTH:
            raise too_deep(position)
        if first == "{":
            return self._object(position)
        if first == "[":
            return self._array(position)
        if first == '"':
            return Node(position, value=self._string())
        if match := _NUMBER.match(self._text, self._at):
            return Node(position, value=self._number(match))
        match = _WORD.match(self._text, self._at)
        if match and match[0] in _WORDS:
            self._at = match.end()
            return Node(position, value=_WORDS[match[0]])
        raise self._error("not JSON: a value was expected")

    def _array(self, position: Position) -> Node:
        items: list[Node] = []
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return sequence(position, items)
        while True:
            self._path.append(len(items))
            items.append(self._value())
            self._path.pop()
            if self._comma_or("]"):
                return sequence(position, items)

    def _object(self, position: Position) -> Node:
        entries: dict[str, Entry] = {}
        self._at += 1
        if self._peek() == "}":
            self._at += 1
            return mapping(position, entries)
        while True:
            if self._peek() != '"':
                raise self._error("not JSON: a field name in double quotes was expected")
            key_position = self._position()
            start = self._at
            key = self._string()
            self._path.append(key)
            if key in entries:
                self._at = start
                line = entries[key].key_position.line
                raise self._error(f"duplicate field, first given on line {line}")
            if self._peek() != ":":
                raise self._error("not JSON: ':' was expected")
            self._at += 1
            entries[key] = Entry(key_position, self._value())
            self._path.pop()
            if self._comma_or("}"):
                return mapping(position, entries)

    def _comma_or(self, end: str) -> bool:
        """Steps over `end` (True) or a comma (False)."""
        found = self._peek()
        if found not in (",", end) or not found:
            raise self._error(f"not JSON: ',' or '{end}' was expected")
        self._at += 1
        return found == end

    def _string(self) -> str:
        match = _STRING.match(self._text, self._at)
        if match is None:
            raise self._error("not JSON: an unfinished string, or a bare control character in it")
        try:
            value: str = json.loads(match[0])
            value.encode()
        except ValueError:  # a bad escape, or half of a surrogate pair
            raise self._error("not JSON: a string with a bad escape") from None
        if "\0" in value:
            raise self._error("text can't hold a NUL character")
        self._at = match.end()
        return value

    def _number(self, match: re.Match[str]) -> int | float:
        text = match[0]
        if len(text) > _MAX_NUMBER:
            raise self._error("a number with too many digits")
        self._at = match.end()
        return float(text) if set(text) & set(".eE") else int(text)

    def _peek(self) -> str:
        """The next character that isn't blank; empty at the end."""
        blank = _BLANK.match(self._text, self._at)
        self._at = blank.end() if blank else self._at
        return self._text[self._at : self._at + 1]

    def _position(self) -> Position:
        line = bisect.bisect_right(self._lines, self._at)
        return Position(self._source, line, self._at - self._lines[line - 1] + 1)

    def _error(self, message: str) -> SpecError:
        return SpecError([Problem(self._position(), field_path(tuple(self._path)), message)])
