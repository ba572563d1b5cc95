"""What images need to know of ELF files: sections, needed libraries, the memory of segments.

Only little-endian 64-bit files are read (System V ABI, chapters 4 and 5).
"""

from __future__ import annotations

import struct

MAGIC = b"\x7fELF"

_PT_LOAD = 1
_PT_DYNAMIC = 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


class ElfError(ValueError):
    """These bytes are no ELF file of ours, or a damaged one."""


class Elf:
    """An ELF file in memory. Raises ElfError where it is none, or its tables lie outside it."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 64 or data[:4] != MAGIC or data[4:6] != b"\x02\x01":
            raise ElfError("it is no 64-bit little-endian ELF file")
        self._data = data
        self._program = struct.unpack_from("<Q", data, 32)[0]
        self._sections = struct.unpack_from("<Q", data, 40)[0]
        (self._program_size, self._program_count) = struct.unpack_from("<HH", data, 54)
        (self._section_size, self._section_count, self._names) = struct.unpack_from(
            "<HHH", data, 58
        )

    def section(self, name: str) -> bytes:
        """The content of a section; nothing where there is none of that name."""
        headers = [
            self._unpack("<IIQQQQ", self._sections + number * self._section_size)
            for number in range(self._section_count)
        ]
        if self._names >= len(headers):
            return b""
        names = self._slice(headers[self._names][4], headers[self._names][5])
        for header in headers:
            if _text(names, header[0]) == name:
                return self._slice(header[4], header[5])
        return b""

    def loaded_bytes(self) -> int:
        """The memory all loaded segments take, in bytes."""
        return sum(segment[6] for segment in self._segments() if segment[0] == _PT_LOAD)

    def needed(self) -> list[str]:
        """The shared libraries this file names (DT_NEEDED)."""
        segments = self._segments()
        tags: list[tuple[int, ...]] = []
        for segment in segments:
            if segment[0] == _PT_DYNAMIC:
                table = self._slice(segment[2], segment[5])
                tags = [
                    struct.unpack_from("<QQ", table, at) for at in range(0, len(table) - 15, 16)
                ]
        strings = next((value for tag, value in tags if tag == _DT_STRTAB), None)
        if strings is None:
            return []
        for segment in segments:
            if segment[0] == _PT_LOAD and segment[3] <= strings < segment[3] + segment[5]:
                table = self._data[segment[2] + strings - segment[3] :]
                return [_text(table, value) for tag, value in tags if tag == _DT_NEEDED]
        raise ElfError("its table of strings is in no segment")

    def _segments(self) -> list[tuple[int, ...]]:
        """Type, flags, offset, address, physical address, size in the file, size in memory."""
        return [
            self._unpack("<IIQQQQQ", self._program + number * self._program_size)
            for number in range(self._program_count)
        ]

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(form, self._data, at)
        except (struct.error, OverflowError) as error:
            raise ElfError("one of its tables lies outside the file") from error

    def _slice(self, start: int, size: int) -> bytes:
        if start + size > len(self._data):
            raise ElfError("one of its parts lies outside the file")
        return self._data[start : start + size]


def _text(table: bytes, at: int) -> str:
    end = table.find(b"\0", at)
    if at > len(table) or end < 0:
        raise ElfError("a name lies outside its table")
    return table[at:end].decode("ascii", "replace")
