"""What a file that a guest has left is, by its content: one judgement for all who look at it."""

from __future__ import annotations

import json

# How much of a file is looked at to tell what it is (bytes).
_SNIFFED = 4 * 1024 * 1024


def media_type_of(content: bytes) -> str:
    """JSON, text or bytes, by looking at it; a file too large to be looked at is bytes."""
    if len(content) > _SNIFFED:
        return "application/octet-stream"
    try:
        read_json(content)
    except UnicodeDecodeError:
        return "application/octet-stream"
    except ValueError:
        return "text/plain"
    return "application/json"


def read_json(content: bytes) -> object:
    """The value of JSON as RFC 8259 has it.

    Raises ValueError for what is no UTF-8, has a byte order mark, nests too deeply, or has `NaN` or
    `Infinity` in it, which Python takes and hardly anybody else.
    """
    try:
        return json.loads(content.decode(), parse_constant=no_number)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def no_number(constant: str) -> object:
    """For `json.loads`: refuse `NaN` and `Infinity` (RFC 8259, section 6). Raises ValueError."""
    raise ValueError(f"{constant} is no JSON")
