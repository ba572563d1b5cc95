"""What the bodies of the protocol's messages mean, with a strict decoder for each.

Every decoder takes any bytes and either returns a message or raises ProtocolError.
Unknown fields are ignored, so either side may add some.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .bodies import decode_body, encode_body
from .frames import ProtocolError
from .limits import Limits

CHUNK_BYTES = 4096
"""Most output bytes in one chunk (protocol, "Exec")."""

CHUNK_BYTES_RAW = 32 * 1024
"""The same for a host that takes raw bodies: half of what a pipe holds (pipe(7))."""

Stream = Literal["stdout", "stderr"]
_I64 = 2**63 - 1


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


class WriteFile(NamedTuple):
    path: str
    content: bytes
    create_parents: bool = True


class Outcome(NamedTuple):
    """Answer to WriteFile, MkdirP and PtyOpen."""

    success: bool
    error: str | None = None


class FileContent(NamedTuple):
    success: bool
    content: bytes = b""
    error: str | None = None


class FileStat(NamedTuple):
    """``size`` in bytes; ``error`` None and ``exists`` false when the path is not there."""

    exists: bool
    size: int | None = None
    error: str | None = None


class Listening(NamedTuple):
    """Answer to FORWARD_LISTEN: the port really listened on, or why there is none."""

    port: int
    error: str | None = None


class PtyOpen(NamedTuple):
    cols: int
    rows: int
    program: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str | None = None
    interactive: bool = False


class TelemetrySubscription(NamedTuple):
    """``interval_ms`` is raised to 100 when it is lower (protocol, "Telemetry")."""

    interval_ms: int = 1000
    include_kernel_threads: bool = False


class SystemUsage(NamedTuple):
    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    net_rx_bytes: int
    net_tx_bytes: int
    procs_running: int
    open_fds: int


class ProcessUsage(NamedTuple):
    pid: int
    comm: str
    rss_bytes: int
    cpu_jiffies: int
    state: str


class TelemetryBatch(NamedTuple):
    seq: int
    timestamp_ms: int
    system: SystemUsage | None
    processes: tuple[ProcessUsage, ...]


class Configure(NamedTuple):
    """What programs find and must keep to. ``env`` is under that of each request; ``allowed``
    None allows every program; ``limits`` None leaves the protocol's. ``seed`` is mixed into
    the kernel's random numbers; ``clock`` is the time in seconds since 1970, or None."""

    env: tuple[tuple[str, str], ...] = ()
    allowed: tuple[str, ...] | None = None
    limits: Limits | None = None
    seed: bytes = b""
    clock: float | None = None


class Configured(NamedTuple):
    """Answer to Configure: what went wrong since the machine booted, or in ``error`` why it is
    not configured."""

    warnings: tuple[str, ...] = ()
    error: str | None = None


# -- exec ---------------------------------------------------------------------------------


def encode_exec_request(message: ExecRequest, *, raw: bool) -> bytes:
    values = message._asdict()
    return encode_body(values, {"stdin": values.pop("stdin")}, raw=raw)


def decode_exec_request(body: bytes, *, raw: bool) -> ExecRequest:
    values, data = decode_body(body, ("stdin",), raw=raw)
    return ExecRequest(
        _text(values, "program"),
        _texts(values, "args"),
        data.get("stdin", b""),
        _pairs(values, "env"),
        _optional_text(values, "working_dir"),
        _optional_number(values, "timeout_secs"),
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
    return ExecChunk(stream, data["data"], _number(values, "seq"))


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
        _number(values, "exit_code", low=-(2**31)),
        _optional_text(values, "error"),
        _optional_number(values, "duration_ms"),
        _optional_number(values, "signal"),
        _flag(values, "truncated", default=False),
    )


def encode_signal(number: int) -> bytes:
    return encode_body({"signal": number})


def decode_signal(body: bytes) -> int:
    return _number(decode_body(body)[0], "signal", low=1, high=64)


# -- files --------------------------------------------------------------------------------


def encode_write_file(message: WriteFile, *, raw: bool) -> bytes:
    return encode_body(
        {"path": message.path, "create_parents": message.create_parents},
        {"content": message.content},
        raw=raw,
    )


def decode_write_file(body: bytes, *, raw: bool) -> WriteFile:
    values, data = decode_body(body, ("content",), raw=raw)
    if "content" not in data:
        raise ProtocolError("WriteFile without content")
    return WriteFile(
        _text(values, "path"), data["content"], _flag(values, "create_parents", default=True)
    )


def encode_path(path: str) -> bytes:
    """The body of MkdirP, ReadFile and FileStat."""
    return encode_body({"path": path})


def decode_path(body: bytes) -> str:
    return _text(decode_body(body)[0], "path")


def encode_outcome(message: Outcome) -> bytes:
    return encode_body(message._asdict())


def decode_outcome(body: bytes) -> Outcome:
    values = decode_body(body)[0]
    return Outcome(_flag(values, "success"), _optional_text(values, "error"))


def encode_file_content(message: FileContent, *, raw: bool) -> bytes:
    values = message._asdict()
    return encode_body(values, {"content": values.pop("content")}, raw=raw)


def decode_file_content(body: bytes, *, raw: bool) -> FileContent:
    values, data = decode_body(body, ("content",), raw=raw)
    return FileContent(
        _flag(values, "success"), data.get("content", b""), _optional_text(values, "error")
    )


def encode_file_stat(message: FileStat) -> bytes:
    return encode_body(message._asdict())


def decode_file_stat(body: bytes) -> FileStat:
    values = decode_body(body)[0]
    return FileStat(
        _flag(values, "exists"),
        _optional_number(values, "size"),
        _optional_text(values, "error"),
    )


# -- ports --------------------------------------------------------------------------------


def encode_port(port: int) -> bytes:
    """The body of FORWARD_LISTEN and FORWARD_OPEN."""
    return encode_body({"port": port})


def decode_port(body: bytes) -> int:
    return _number(decode_body(body)[0], "port", high=65535)


def encode_listening(message: Listening) -> bytes:
    return encode_body(message._asdict())


def decode_listening(body: bytes) -> Listening:
    values = decode_body(body)[0]
    return Listening(_number(values, "port", high=65535), _optional_text(values, "error"))


# -- PTY ----------------------------------------------------------------------------------


def encode_pty_open(message: PtyOpen) -> bytes:
    return encode_body(message._asdict())


def decode_pty_open(body: bytes) -> PtyOpen:
    values = decode_body(body)[0]
    return PtyOpen(
        _number(values, "cols", high=65535),
        _number(values, "rows", high=65535),
        _text(values, "program"),
        _texts(values, "args"),
        _pairs(values, "env"),
        _optional_text(values, "working_dir"),
        _flag(values, "interactive", default=False),
    )


def encode_pty_resize(cols: int, rows: int) -> bytes:
    return encode_body({"cols": cols, "rows": rows})


def decode_pty_resize(body: bytes) -> tuple[int, int]:
    values = decode_body(body)[0]
    return _number(values, "cols", high=65535), _number(values, "rows", high=65535)


def encode_pty_closed(exit_code: int) -> bytes:
    return encode_body({"exit_code": exit_code})


def decode_pty_closed(body: bytes) -> int:
    return _number(decode_body(body)[0], "exit_code", low=-(2**31))


# -- telemetry ----------------------------------------------------------------------------


def encode_subscription(message: TelemetrySubscription) -> bytes:
    return encode_body(message._asdict())


def decode_subscription(body: bytes) -> TelemetrySubscription:
    if not body:
        return TelemetrySubscription()
    values = decode_body(body)[0]
    return TelemetrySubscription(
        _number(values, "interval_ms") if "interval_ms" in values else 1000,
        _flag(values, "include_kernel_threads", default=False),
    )


def encode_telemetry(message: TelemetryBatch) -> bytes:
    values: dict[str, Any] = message._asdict()
    values["system"] = None if message.system is None else message.system._asdict()
    values["processes"] = [process._asdict() for process in message.processes]
    values["trace_context"] = None
    return encode_body(values)


def decode_telemetry(body: bytes) -> TelemetryBatch:
    values = decode_body(body)[0]
    system = values.get("system")
    processes = values.get("processes")
    if not isinstance(processes, list):
        raise ProtocolError("telemetry without a list of processes")
    return TelemetryBatch(
        _number(values, "seq"),
        _number(values, "timestamp_ms"),
        None if system is None else _system(system),
        tuple(_process(process) for process in processes),
    )


def _system(values: object) -> SystemUsage:
    if not isinstance(values, dict):
        raise ProtocolError("field 'system' is not an object")
    percent = values.get("cpu_percent")
    if not isinstance(percent, int | float) or isinstance(percent, bool):
        raise ProtocolError("field 'cpu_percent' is not a number")
    if not 0 <= percent <= 1_000_000:
        raise ProtocolError("field 'cpu_percent' is out of range")
    counts = (_number(values, name) for name in SystemUsage._fields[1:])
    return SystemUsage(float(percent), *counts)


def _process(values: object) -> ProcessUsage:
    if not isinstance(values, dict):
        raise ProtocolError("a process is not an object")
    return ProcessUsage(
        _number(values, "pid"),
        _text(values, "comm"),
        _number(values, "rss_bytes"),
        _number(values, "cpu_jiffies"),
        _text(values, "state"),
    )


# -- configure ----------------------------------------------------------------------------

MAX_SEED = 4096
"""Most bytes of a seed."""

MAX_CLOCK = 2.0**33
"""The latest time taken, in seconds since 1970: the year 2242."""


def encode_configure(message: Configure) -> bytes:
    values: dict[str, Any] = message._asdict()
    values["limits"] = None if message.limits is None else message.limits._asdict()
    values["seed"] = message.seed.hex()
    return encode_body(values)


def decode_configure(body: bytes) -> Configure:
    values = decode_body(body)[0]
    limits = values.get("limits")
    if limits is not None and not isinstance(limits, dict):
        raise ProtocolError("field 'limits' is not an object")
    return Configure(
        _pairs(values, "env"),
        None if values.get("allowed") is None else _texts(values, "allowed"),
        None if limits is None else decode_limits(limits),
        _seed(values),
        _clock(values),
    )


def decode_limits(values: dict[str, Any]) -> Limits:
    """Limits out of an object; one that is missing or null has the protocol's value."""
    return Limits(
        *(
            default if values.get(name) is None else _number(values, name, low=1)
            for name, default in Limits()._asdict().items()
        )
    )


def _seed(values: dict[str, Any]) -> bytes:
    text = _optional_text(values, "seed") or ""
    try:
        seed = bytes.fromhex(text)
    except ValueError:
        raise ProtocolError("field 'seed' is not hexadecimal") from None
    if len(seed) > MAX_SEED:
        raise ProtocolError("field 'seed' is too long")
    return seed


def _clock(values: dict[str, Any]) -> float | None:
    value = values.get("clock")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ProtocolError("field 'clock' is not a number")
    if not 0 <= value < MAX_CLOCK:
        raise ProtocolError("field 'clock' is out of range")
    return float(value)


def encode_configured(message: Configured) -> bytes:
    return encode_body(message._asdict())


def decode_configured(body: bytes) -> Configured:
    values = decode_body(body)[0]
    return Configured(_texts(values, "warnings"), _optional_text(values, "error"))


# -- fields -------------------------------------------------------------------------------


def _text(values: dict[str, Any], name: str) -> str:
    return _checked_text(values.get(name), name)


def _checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"field {name!r} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no system call takes
        raise ProtocolError(f"field {name!r} is not Unicode text") from None
    return value


def _optional_text(values: dict[str, Any], name: str) -> str | None:
    return None if values.get(name) is None else _text(values, name)


def _texts(values: dict[str, Any], name: str) -> tuple[str, ...]:
    items = values.get(name, [])
    if not isinstance(items, list):
        raise ProtocolError(f"field {name!r} is not an array")
    return tuple(_checked_text(item, name) for item in items)


def _pairs(values: dict[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    items = values.get(name, [])
    if not isinstance(items, list):
        raise ProtocolError(f"field {name!r} is not an array")
    pairs: list[tuple[str, str]] = []
    for item in items:
        if not isinstance(item, list) or len(item) != 2:
            raise ProtocolError(f"field {name!r} is not an array of pairs")
        pairs.append((_checked_text(item[0], name), _checked_text(item[1], name)))
    return tuple(pairs)


def _number(values: dict[str, Any], name: str, *, low: int = 0, high: int = _I64) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"field {name!r} is not a whole number")
    if not low <= value <= high:
        raise ProtocolError(f"field {name!r} is out of range")
    return value


def _optional_number(values: dict[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else _number(values, name)


def _flag(values: dict[str, Any], name: str, *, default: bool | None = None) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"field {name!r} is not true or false")
    return value
