"""Messages of telemetry (protocol, "Telemetry")."""

from __future__ import annotations

from typing import Any, NamedTuple

from .bodies import decode_body, encode_body
from .fields import flag, number, text
from .frames import ProtocolError


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


def encode_subscription(message: TelemetrySubscription) -> bytes:
    return encode_body(message._asdict())


def decode_subscription(body: bytes) -> TelemetrySubscription:
    if not body:
        return TelemetrySubscription()
    values = decode_body(body)[0]
    return TelemetrySubscription(
        number(values, "interval_ms") if "interval_ms" in values else 1000,
        flag(values, "include_kernel_threads", default=False),
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
        number(values, "seq"),
        number(values, "timestamp_ms"),
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
    counts = (number(values, name) for name in SystemUsage._fields[1:])
    return SystemUsage(float(percent), *counts)


def _process(values: object) -> ProcessUsage:
    if not isinstance(values, dict):
        raise ProtocolError("a process is not an object")
    return ProcessUsage(
        number(values, "pid"),
        text(values, "comm"),
        number(values, "rss_bytes"),
        number(values, "cpu_jiffies"),
        text(values, "state"),
    )
