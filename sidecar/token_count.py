"""Counts the tokens a model's answer names, as its bytes pass by. Never holds much of them."""

from __future__ import annotations

import json
from typing import Any

# Of a line, or of an answer in one piece (bytes): what is longer is passed on and not counted.
MAX_LINE_BYTES = 1024 * 1024


# The Messages API counts these beside `input_tokens`; OpenAI's are among them.
_CACHE_KEYS = ("cache_creation_input_tokens", "cache_read_input_tokens")


class TokenCount:
    """For one answer: JSON in one piece, or server-sent events. Numbers come from a model or from
    who pretends to be one; absurd ones are not believed."""

    def __init__(self) -> None:
        self.input_tokens = 0
        self.output_tokens = 0
        self.cache_tokens = 0
        self._line = bytearray()
        self._too_long = False

    def feed(self, data: bytes) -> None:
        """Bytes of the answer, in order."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._add(line)
            self._end_line()
        self._add(rest)

    def end(self) -> None:
        """The answer is over."""
        self._end_line()

    def _add(self, data: bytes) -> None:
        if len(self._line) + len(data) > MAX_LINE_BYTES:
            self._too_long = True
            self._line.clear()
        if not self._too_long:
            self._line += data

    def _end_line(self) -> None:
        line, self._line, self._too_long = bytes(self._line), bytearray(), False
        line = line.removeprefix(b"data:").strip()
        if b'"usage"' not in line:
            return
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return
        for holder in _holders(event):
            usage = holder.get("usage")
            if isinstance(usage, dict):
                # Each event names the total so far, not what is new.
                self.input_tokens = max(self.input_tokens, _count(usage, "input_tokens"))
                self.output_tokens = max(self.output_tokens, _count(usage, "output_tokens"))
                cached = sum(_count(usage, key) for key in _CACHE_KEYS)
                self.cache_tokens = max(self.cache_tokens, cached)


def _holders(event: object) -> list[dict[str, Any]]:
    """The objects that may say what was used: the event, its message, its response."""
    if not isinstance(event, dict):
        return []
    inner = (event.get("message"), event.get("response"))
    return [event, *(each for each in inner if isinstance(each, dict))]


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40:
        return value
    return 0
