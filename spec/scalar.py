"""What an unquoted scalar means, by the core schema of YAML 1.2 (section 10.3.2).

PyYAML's own rules are YAML 1.1's, where `no` is false, `1:30` is ninety and `2024-01-01` a date;
the format's other readers follow 1.2.
"""

from __future__ import annotations

import re

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
# Longer than any number the format has a use for; also keeps int() under its own digit limit.
_MAX_NUMBER = 64
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_BASES = {"0o": 8, "0x": 16}


def resolve(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar: null, a boolean, a number, else the text itself."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if len(text) <= _MAX_NUMBER:
        if _INTEGER.fullmatch(text):
            base = _BASES.get(text[:2], 10)
            return int(text[2:] if base != 10 else text, base)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text
