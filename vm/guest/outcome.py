"""The answer to requests that only succeed or fail: WriteFile, MkdirP and PtyOpen."""

from __future__ import annotations

from typing import NamedTuple

from .bodies import decode_body, encode_body
from .fields import flag, optional_text


class Outcome(NamedTuple):
    """Answer to WriteFile, MkdirP and PtyOpen."""

    success: bool
    error: str | None = None


def encode_outcome(message: Outcome) -> bytes:
    return encode_body(message._asdict())


def decode_outcome(body: bytes) -> Outcome:
    values = decode_body(body)[0]
    return Outcome(flag(values, "success"), optional_text(values, "error"))
