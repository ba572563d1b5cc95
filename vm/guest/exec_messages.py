"""Messages of running a program: the request, its output, its end, signals to it.

Here and in the other files of messages every decoder takes any bytes and either returns a
message or raises ProtocolError.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .bodies import decode_body, encode_body
from .fields import flag, number, optional_number, optional_text, pairs, text, texts
from .frames import ProtocolError

CHUNK_BYTES = 4096
"""Most output bytes in one chunk (protocol, "Exec")."""

CHUNK_BYTES_RAW = 32 * 1024
"""The same for a host that takes raw bodies: half of what a pipe holds (pipe(7))."""

Stream = Literal["stdout", "stderr"]


class ExecRequest(NamedTuple):
    """Run a program. ``timeout_secs`` None or 0: no limit in the guest. ``env`` adds to and
    overrides the guest's own; an empty ``stdin`` is /dev/null."""

    program: str
    args: tuple[str, ...] = ()
    stdin: bytes = b""
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str | None = None
    timeout_secs: int | None = None


class ExecChunk(NamedTuple):
    """Output as it comes; ``seq`` counts from 0 for each stream."""

    stream: Stream
    data: bytes
    seq: int


class ExecResponse(NamedTuple):
    """How an exec ended. ``exit_code`` is -1 with an ``error`` when the program did not exit
    by itself. ``signal`` and ``truncated`` (the output here is only its end) are sent only
    to a CONCURRENT host."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    error: str | None = None
    duration_ms: int | None = None
    signal: int | None = None
    truncated: bool = False


def encode_exec_request(message: ExecRequest, *, raw: bool) -> bytes:
    values = message._asdict()
    return encode_body(values, {"stdin": values.pop("stdin")}, raw=raw)


def decode_exec_request(body: bytes, *, raw: bool) -> ExecRequest:
    values, data = decode_body(body, ("stdin",), raw=raw)
    return ExecRequest(
        text(values, "program"),
        texts(values, "args"),
        data.get("stdin", b""),
        pairs(values, "env"),
        optional_text(values, "working_dir"),
        optional_number(values, "timeout_secs"),
    )


def encode_exec_chunk(message: ExecChunk, *, raw: bool) -> bytes:
    return encode_body(
        {"stream": message.stream, "seq": message.seq}, {"data": message.data}, raw=raw
    )


def decode_exec_chunk(body: bytes, *, raw: bool) -> ExecChunk:
    values, data = decode_body(body, ("data",), raw=raw)
    stream = values.get("stream")
    if stream not in ("stdout", "stderr") or "data" not in data:
        raise ProtocolError("output chunk without a stream or data")
    return ExecChunk(stream, data["data"], number(values, "seq"))


def encode_exec_response(message: ExecResponse, *, raw: bool, extended: bool) -> bytes:
    values: dict[str, Any] = {
        "exit_code": message.exit_code,
        "error": message.error,
        "duration_ms": message.duration_ms,
    }
    if extended:
        values["signal"] = message.signal
        values["truncated"] = message.truncated
    return encode_body(values, {"stdout": message.stdout, "stderr": message.stderr}, raw=raw)


def decode_exec_response(body: bytes, *, raw: bool) -> ExecResponse:
    values, data = decode_body(body, ("stdout", "stderr"), raw=raw)
    return ExecResponse(
        data.get("stdout", b""),
        data.get("stderr", b""),
        number(values, "exit_code", low=-(2**31)),
        optional_text(values, "error"),
        optional_number(values, "duration_ms"),
        optional_number(values, "signal"),
        flag(values, "truncated", default=False),
    )


def encode_signal(number: int) -> bytes:
    return encode_body({"signal": number})


def decode_signal(body: bytes) -> int:
    return number(decode_body(body)[0], "signal", low=1, high=64)
