"""Samples of what runs use."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from voidbus.transport.message import Message, Right


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class GuestSample(_Part):
    """What the guest says of itself. Percent of one core; bytes."""

    cpu_percent: float = 0.0
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    net_rx_bytes: int = 0
    net_tx_bytes: int = 0
    procs_running: int = 0
    open_fds: int = 0


class HostSample(_Part):
    """What the run's process uses on the host, from /proc (proc(5)). Percent of one core; bytes."""

    rss_bytes: int = 0
    cpu_percent: float = 0.0
    io_read_bytes: int = 0
    io_write_bytes: int = 0


class Sample(_Part):
    """One sample: guest or host, never both."""

    seq: int
    timestamp_ms: int
    stage_name: str | None = None
    guest: GuestSample | None = None
    host: HostSample | None = None


class ReadTelemetry(Message, tag="telemetry.read", right=Right.OBSERVE):
    """Samples of a run with seq greater than `from_seq`. Ask `supervisor/telemetry`."""

    run_id: str
    from_seq: int = Field(default=0, ge=0)
    stage_name: str | None = None


class TelemetryPage(Message, tag="telemetry.page"):
    """Samples, oldest first. `next_seq` is the last number given: pass it back as `from_seq`."""

    run_id: str
    next_seq: int
    samples: tuple[Sample, ...]


class GuestSamples(Message, tag="telemetry.guest_samples", right=Right.WORK):
    """A run process hands in what its guest reported: (milliseconds since the epoch, sample).
    `stage_name` is the stage the machine is for, where it is for one only."""

    run_id: str
    stage_name: str | None = None
    samples: tuple[tuple[int, GuestSample], ...]


class SamplesPublished(Message, tag="telemetry.samples"):
    """New samples of a run, oldest first, published on `telemetry/<run id>` once an interval."""

    run_id: str
    samples: tuple[Sample, ...]


class TrackRun(Message, tag="telemetry.track"):
    """Sample this process for this run from now on; `pid` 0: no longer."""

    run_id: str
    pid: int
    start_time: int


def telemetry_topic(run_id: str) -> str:
    return f"telemetry/{run_id}"
