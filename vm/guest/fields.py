"""The fields of a message body, each checked as it is taken.

A function here takes the object a body is, and the name of a field; it returns the value or
raises ProtocolError. Fields nobody asks for are ignored, so either side may add some.
"""

from __future__ import annotations

from typing import Any

from .frames import ProtocolError

_I64 = 2**63 - 1


def text(values: dict[str, Any], name: str) -> str:
    return checked_text(values.get(name), name)


def checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"field {name!r} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no system call takes
        raise ProtocolError(f"field {name!r} is not Unicode text") from None
    return value


def optional_text(values: dict[str, Any], name: str) -> str | None:
    return None if values.get(name) is None else text(values, name)


def texts(values: dict[str, Any], name: str) -> tuple[str, ...]:
    items = values.get(name, [])
    if not isinstance(items, list):
        raise ProtocolError(f"field {name!r} is not an array")
    return tuple(checked_text(item, name) for item in items)


def pairs(values: dict[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    items = values.get(name, [])
    if not isinstance(items, list):
        raise ProtocolError(f"field {name!r} is not an array")
    found: list[tuple[str, str]] = []
    for item in items:
        if not isinstance(item, list) or len(item) != 2:
            raise ProtocolError(f"field {name!r} is not an array of pairs")
        found.append((checked_text(item[0], name), checked_text(item[1], name)))
    return tuple(found)


def number(values: dict[str, Any], name: str, *, low: int = 0, high: int = _I64) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"field {name!r} is not a whole number")
    if not low <= value <= high:
        raise ProtocolError(f"field {name!r} is out of range")
    return value


def optional_number(values: dict[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else number(values, name)


def flag(values: dict[str, Any], name: str, *, default: bool | None = None) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"field {name!r} is not true or false")
    return value
