"""`voidbus telemetry`: what a run uses."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from voidbus.actors.messages.telemetry import ReadTelemetry, Sample, TelemetryPage
from voidbus.cli.connect import TELEMETRY, connect
from voidbus.cli.find import find_run
from voidbus.cli.options import Place, json_option, place_options, run_argument
from voidbus.cli.output import note, print_json, print_table, size


@click.command()
@run_argument
@click.option(
    "--from-seq",
    type=click.IntRange(min=0),
    default=0,
    metavar="SEQ",
    help="Only samples after this number.",
)
@click.option("--stage", metavar="STAGE", help="Only samples taken during this stage.")
@json_option
@place_options
@click.pass_obj
def telemetry(place: Place, run: str, from_seq: int, stage: str | None, as_json: bool) -> None:
    """Show samples of what a run's guest and its process on the host use, oldest first."""
    with connect(place.where) as supervisor:
        run_id = find_run(supervisor, run).id
        page = supervisor.ask(
            TELEMETRY,
            ReadTelemetry(run_id=run_id, from_seq=from_seq, stage_name=stage),
            TelemetryPage,
        )
    if as_json:
        print_json(page)
    elif page.samples:
        print_table(
            ("SEQ", "TIME", "WHERE", "STAGE", "CPU", "MEMORY", "READ/RECEIVED", "WRITTEN/SENT"),
            [_row(sample) for sample in page.samples],
        )
    else:
        note("no samples; they are kept in memory, from the run's start to the supervisor's end")


def _row(sample: Sample) -> list[str]:
    when = datetime.fromtimestamp(sample.timestamp_ms / 1000, UTC)
    head = [str(sample.seq), when.strftime("%H:%M:%S")]
    stage = sample.stage_name or "-"
    if sample.guest is not None:
        guest = sample.guest
        used = size(guest.memory_used_bytes)
        if guest.memory_total_bytes:
            used += f" of {size(guest.memory_total_bytes)}"
        sent = (size(guest.net_rx_bytes), size(guest.net_tx_bytes))
        return [*head, "guest", stage, f"{guest.cpu_percent:.1f}%", used, *sent]
    if sample.host is not None:
        host = sample.host
        moved = (size(host.io_read_bytes), size(host.io_write_bytes))
        return [*head, "host", stage, f"{host.cpu_percent:.1f}%", size(host.rss_bytes), *moved]
    return [*head, "-", stage, "-", "-", "-", "-"]
