"""Message bodies: a JSON object, some of whose fields are bytes.

Base form: one JSON object; a byte field is an array of integers 0 to 255.

Raw form (both sides set ``RAW_BODIES``): ``[u32 LE length of the JSON][JSON object][bytes]``.
In the object a byte field holds its length as an integer; the bytes themselves follow the
JSON, one field after the other in the order the message type declares them, and must fill
the body exactly.

Whatever comes in, decoding costs a few times the bytes received: byte arrays are cut out
and turned into bytes before the JSON parser runs, and what remains for it is capped.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any

from .frames import ProtocolError

MAX_JSON = 4 * 1024 * 1024
"""Largest JSON part in bytes, byte arrays not counted. Twice Linux's default for argv and
environment together (ARG_MAX, 2 MiB), the largest thing a request must carry as text."""

_LENGTH = struct.Struct("<I")
_DECIMALS = [str(value).encode() for value in range(256)]
_SLICE = 64 * 1024

Fields = tuple[str, ...]


def encode_body(
    values: dict[str, Any], byte_fields: dict[str, bytes] | None = None, *, raw: bool = False
) -> bytes:
    """A body from plain values and byte fields, in the form the peer understands."""
    byte_fields = byte_fields or {}
    if not raw or not byte_fields:
        text = json.dumps(values, separators=(",", ":")).encode()
        if not byte_fields:
            return text
        arrays = [
            b'"%s":[%s]' % (name.encode(), b",".join(map(_DECIMALS.__getitem__, data)))
            for name, data in byte_fields.items()
        ]
        head = text[:-1] + b"," if values else b"{"
        return head + b",".join(arrays) + b"}"
    lengths = {name: len(data) for name, data in byte_fields.items()}
    text = json.dumps({**values, **lengths}, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *byte_fields.values()])


def decode_body(
    body: bytes, byte_fields: Fields = (), *, raw: bool = False
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Plain values and byte fields of a body. Absent byte fields are left out.

    Raises ProtocolError, and nothing else, whatever the bytes are.
    """
    if not byte_fields:
        return _parse(body), {}
    if raw:
        return _decode_raw(body, byte_fields)
    text, arrays = _cut_arrays(body, byte_fields)
    values = _parse(text)
    data: dict[str, bytes] = {}
    for name in byte_fields:
        if name not in values:
            continue
        marker = values.pop(name)
        if name not in arrays or marker != 0 or isinstance(marker, bool):
            raise ProtocolError(f"field {name!r} is not an array of bytes")
        data[name] = arrays[name]
    return values, data


def _decode_raw(body: bytes, byte_fields: Fields) -> tuple[dict[str, Any], dict[str, bytes]]:
    if len(body) < _LENGTH.size:
        raise ProtocolError("body too short for the length of its JSON part")
    length = _LENGTH.unpack_from(body)[0]
    position = _LENGTH.size + length
    if position > len(body):
        raise ProtocolError("the JSON part is longer than the body")
    values = _parse(body[_LENGTH.size : position])
    data: dict[str, bytes] = {}
    for name in byte_fields:
        if name not in values:
            continue
        size = values.pop(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ProtocolError(f"field {name!r} is not a length")
        if size > len(body) - position:
            raise ProtocolError(f"field {name!r} is longer than the body")
        data[name] = body[position : position + size]
        position += size
    if position != len(body):
        raise ProtocolError(f"{len(body) - position} bytes after the last field")
    return values, data


def _cut_arrays(body: bytes, byte_fields: Fields) -> tuple[bytes, dict[str, bytes]]:
    """The body with each byte array replaced by 0, and the arrays as bytes.

    A quote inside a JSON string is always escaped, so the pattern can only match a key.
    """
    names = "|".join(map(re.escape, byte_fields)).encode()
    opening = re.compile(rb'(?<!\\)"(' + names + rb')"[ \t\r\n]*:[ \t\r\n]*\[')
    pieces: list[bytes] = []
    arrays: dict[str, bytes] = {}
    position = 0
    while (match := opening.search(body, position)) is not None:
        end = body.find(b"]", match.end())
        if end < 0:
            raise ProtocolError("an array of bytes has no end")
        name = match.group(1).decode()
        if name in arrays:
            raise ProtocolError(f"field {name!r} comes twice")
        arrays[name] = _parse_array(body, match.end(), end, name)
        pieces += [body[position : match.end() - 1], b"0"]
        position = end + 1
    pieces.append(body[position:])
    return b"".join(pieces), arrays


def _parse_array(body: bytes, start: int, end: int, name: str) -> bytes:
    data = bytearray()
    position = start
    try:
        while position < end:
            # Cut at a comma, so that only a slice at a time exists as Python objects.
            stop = body.find(b",", position + _SLICE, end)
            last = stop < 0
            if last:
                stop = end
            part = body[position:stop]
            if not (last and not data and not part.strip(b" \t\r\n")):
                if _NOT_A_LIST.search(part):
                    raise ProtocolError(f"field {name!r} is not an array of bytes")
                data += bytes(map(int, part.split(b",")))
            position = stop + 1
            if not last and position >= end:
                raise ProtocolError(f"field {name!r} ends with a comma")
    except ValueError:
        raise ProtocolError(f"field {name!r} is not an array of bytes") from None
    return bytes(data)


_NOT_A_LIST = re.compile(rb"[^0-9, \t\r\n]")


def _parse(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_JSON:
        raise ProtocolError(f"JSON of {len(text)} bytes is over the {MAX_JSON} byte cap")
    try:
        value = json.loads(text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"body is not JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ProtocolError("body is not a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
