"""Messages of a program on a terminal (protocol, "PTY")."""

from __future__ import annotations

from typing import NamedTuple

from .bodies import decode_body, encode_body
from .fields import flag, number, optional_text, pairs, text, texts


class PtyOpen(NamedTuple):
    cols: int
    rows: int
    program: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str | None = None
    interactive: bool = False


def encode_pty_open(message: PtyOpen) -> bytes:
    return encode_body(message._asdict())


def decode_pty_open(body: bytes) -> PtyOpen:
    values = decode_body(body)[0]
    return PtyOpen(
        number(values, "cols", high=65535),
        number(values, "rows", high=65535),
        text(values, "program"),
        texts(values, "args"),
        pairs(values, "env"),
        optional_text(values, "working_dir"),
        flag(values, "interactive", default=False),
    )


def encode_pty_resize(cols: int, rows: int) -> bytes:
    return encode_body({"cols": cols, "rows": rows})


def decode_pty_resize(body: bytes) -> tuple[int, int]:
    values = decode_body(body)[0]
    return number(values, "cols", high=65535), number(values, "rows", high=65535)


def encode_pty_closed(exit_code: int) -> bytes:
    return encode_body({"exit_code": exit_code})


def decode_pty_closed(body: bytes) -> int:
    return number(decode_body(body)[0], "exit_code", low=-(2**31))
