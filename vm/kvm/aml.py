"""ACPI machine language: as much of it as describes devices that sit at an address.

The encodings are those of the ACPI specification, version 6.5: chapter 20 (AML) and section 6.4
(resource descriptors).
"""

from __future__ import annotations

import re
import struct

_NAME = re.compile(r"[A-Z_][A-Z0-9_]{3}")
_EISA = re.compile(r"[A-Z]{3}[0-9A-F]{4}")
_MAX_PACKAGE = (1 << 28) - 1

# 20.3, the byte stream table.
_ZERO, _ONE = b"\x00", b"\x01"
_NAME_OP, _SCOPE_OP, _DEVICE_OP = b"\x08", b"\x10", b"\x5b\x82"
_BUFFER_OP, _PACKAGE_OP = b"\x11", b"\x12"
_STRING = b"\x0d"
_INTEGERS = ((b"\x0a", "<B"), (b"\x0b", "<H"), (b"\x0c", "<I"), (b"\x0e", "<Q"))


def name_segment(text: str) -> bytes:
    """One name of four characters (20.2.2). Raises ValueError."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name in AML: four of A-Z, 0-9 and _")
    return text.encode()


def package_length(size: int) -> bytes:
    """The length of what follows, itself included (20.2.4). Raises ValueError past 256 MiB."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for more in (1, 2, 3):
        total = size + 1 + more
        if total < 1 << 4 + 8 * more:
            first = more << 6 | total & 0xF
            return bytes([first]) + (total >> 4).to_bytes(more, "little")
    raise ValueError(f"{size} bytes are too many for AML; at most {_MAX_PACKAGE - 4}")


def _sized(operator: bytes, content: bytes) -> bytes:
    return operator + package_length(len(content)) + content


def integer(value: int) -> bytes:
    """An integer in as few bytes as it needs (20.2.3). Raises ValueError for no 64 bits."""
    if value == 0:
        return _ZERO
    if value == 1:
        return _ONE
    for prefix, form in _INTEGERS:
        if 0 <= value < 1 << 8 * struct.calcsize(form):
            return prefix + struct.pack(form, value)
    raise ValueError(f"{value} is no integer of AML")


def string(text: str) -> bytes:
    """Raises ValueError for what is not ASCII, or has a zero."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"{text!r} is no string of AML")
    return _STRING + text.encode() + b"\0"


def eisa_id(text: str) -> bytes:
    """A device's identity such as `PNP0501`, packed into an integer (19.6.36). Raises
    ValueError."""
    if not _EISA.fullmatch(text):
        raise ValueError(f"{text!r} is no EISA id: three letters, then four hexadecimal digits")
    value = 0
    for letter in text[:3]:
        value = value << 5 | ord(letter) - 0x40
    value = value << 16 | int(text[3:], 16)
    return b"\x0c" + struct.pack(">I", value)


def named(name: str, value: bytes) -> bytes:
    """`Name (name, value)`."""
    return _NAME_OP + name_segment(name) + value


def package(*elements: bytes) -> bytes:
    """`Package () {elements}`, 255 at most."""
    return _sized(_PACKAGE_OP, bytes([len(elements)]) + b"".join(elements))


def buffer(content: bytes) -> bytes:
    """`Buffer () {content}`."""
    return _sized(_BUFFER_OP, integer(len(content)) + content)


def scope(name: str, *terms: bytes) -> bytes:
    """`Scope (\\name) {terms}`."""
    return _sized(_SCOPE_OP, b"\\" + name_segment(name) + b"".join(terms))


def device(name: str, *terms: bytes) -> bytes:
    """`Device (name) {terms}`."""
    return _sized(_DEVICE_OP, name_segment(name) + b"".join(terms))


def resources(*descriptors: bytes) -> bytes:
    """`ResourceTemplate () {descriptors}`: closed by an end tag whose checksum is not given
    (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def memory(address: int, size: int) -> bytes:
    """`Memory32Fixed (ReadWrite, address, size)` (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, address, size)


def ports(address: int, size: int) -> bytes:
    """`IO (Decode16, address, address, 1, size)` (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, address, address, 1, size)


def interrupt(line: int) -> bytes:
    """`Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {line}` (6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0b0011, 1, line)
