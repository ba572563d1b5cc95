"""How fast the HTTP API answers, and how late an event reaches a client that listens.

Peer: a bare aiohttp handler that answers with one small object, asked by the same client.
Reported: requests a second, median and 99th percentile of health, inspect and events of 32 ended
runs in turn, at 1 and 32 clients; the time of 200 short runs from their requests to the end of the
last; how long after it was printed in the guest a line is in the hands of a client.
Target: health at least half the bare handler's rate, inspect a quarter; a line in 10 ms, median.
How: all over Unix sockets with connections that are kept, measured in turns; medians of the rounds.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from kit.http_load import Connection, Load, load
from kit.measure import Report, percentile, start_report
from kit.supervised import TERMINAL, Supervised

PEER = Path(__file__).parent / "peers" / "bare_http.py"
TARGETS = {"health": "/v1/health", "inspect": "/v1/runs/{run}", "events": "/v1/runs/{run}/events"}
CLOCK = """
import sys, time
for _ in range(int(sys.argv[1])):
    print(time.time_ns(), flush=True)
    time.sleep(0.05)
"""


def workflow(folder: Path, name: str, *command: str) -> Path:
    """A specification of one step."""
    path = folder / f"{name}.json"
    step = {"name": "step", "run": {"program": command[0], "args": list(command[1:])}}
    spec = {"kind": "workflow", "name": name, "sandbox": {"mode": "mock"}}
    path.write_text(json.dumps({**spec, "workflow": {"steps": [step]}}))
    return path


@contextmanager
def bare_handler(folder: Path) -> Iterator[str]:
    socket = folder / "bare.sock"
    process = subprocess.Popen([sys.executable, str(PEER), str(socket)])
    try:
        deadline = time.monotonic() + 20.0
        while not socket.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the bare handler did not come up")
            time.sleep(0.01)
        yield str(socket)
    finally:
        process.terminate()
        process.wait(20.0)


async def ended_run(path: str, file: Path) -> str:
    """A run that has ended."""
    connection = Connection(path)
    await connection.open()
    _, body = await connection.ask("POST", "/v1/runs", {"file": str(file)})
    run: str = json.loads(body)["run_id"]
    async for _, event in connection.listen(f"/v1/runs/{run}/events/stream"):
        if event["event_type"] in TERMINAL:
            break
    connection.close()
    return run


def rates(
    report: Report, api: str, bare: str, runs: Sequence[str], requests: int, rounds: int
) -> None:
    """Requests a second beside the bare handler's."""
    for clients in (1, 32):
        found: dict[str, list[Load]] = {"bare": [], **{name: [] for name in TARGETS}}
        for _ in range(rounds):
            for name, loads in found.items():
                path = bare if name == "bare" else api
                target = TARGETS.get(name, "/v1/health")
                targets = [target.format(run=run) for run in runs]
                loads.append(asyncio.run(load(path, targets, clients, requests)))
        floor = median(each.rate for each in found["bare"])
        for name, loads in found.items():
            latencies = [value for each in loads for value in each.latencies]
            rate = median(each.rate for each in loads)
            what = f"{name}, {clients} client{'s' if clients > 1 else ''}"
            report.figure(f"{what}: requests a second", rate)
            report.figure(f"{what}: median", median(latencies) * 1000, "ms")
            report.figure(f"{what}: 99th percentile", percentile(latencies, 0.99) * 1000, "ms")
            wanted = {"health": 0.5, "inspect": 0.25}.get(name)
            if wanted is not None:
                report.at_least(f"{what}: share of the bare handler's rate", rate / floor, wanted)


async def many_runs(supervised: Supervised, path: str, file: Path, count: int) -> float:
    """Seconds from the first request to the end of the last run."""
    connections = [Connection(path) for _ in range(16)]
    for connection in connections:
        await connection.open()
    left = iter(range(count))
    runs: list[str] = []

    async def start(connection: Connection) -> None:
        for _ in left:
            status, body = await connection.ask("POST", "/v1/runs", {"file": str(file)})
            if status != 200:
                raise RuntimeError(body.decode())
            runs.append(json.loads(body)["run_id"])

    began = time.monotonic()
    await asyncio.gather(*(start(connection) for connection in connections))
    last = 0.0
    for run in runs:
        last = max(last, supervised.events.wait(run, *TERMINAL, timeout=300.0))
    for connection in connections:
        connection.close()
    return last - began


async def latencies(path: str, file: Path) -> list[float]:
    """Milliseconds from the guest's print to the client's hands, line by line."""
    connection = Connection(path)
    await connection.open()
    _, body = await connection.ask("POST", "/v1/runs", {"file": str(file)})
    run = json.loads(body)["run_id"]
    found: list[float] = []
    async for arrived, event in connection.listen(f"/v1/runs/{run}/events/stream"):
        if event["event_type"] == "log.chunk" and event["stream"] == "stdout":
            found.append((arrived - int(event["message"])) / 1e6)
        if event["event_type"] in TERMINAL:
            break
    connection.close()
    return found


def main() -> None:
    report, options = start_report(__file__, __doc__)
    quick = options.quick
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        folder = Path(name)
        api = f"{name}/api.sock"
        with (
            bare_handler(folder) as bare,
            Supervised(VOIDBUS_API__LISTEN=f"unix://{api}") as supervised,
        ):
            short = workflow(folder, "short", "echo", "hello")
            runs = [asyncio.run(ended_run(api, short)) for _ in range(2 if quick else 32)]
            rates(report, api, bare, runs, 50 if quick else 2000, 1 if quick else 5)
            lines = asyncio.run(
                latencies(
                    api, workflow(folder, "clock", "python3", "-c", CLOCK, "5" if quick else "200")
                )
            )
            report.figure("a line from guest to client: median", median(lines), "ms")
            report.figure("a line from guest to client: 99th", percentile(lines, 0.99), "ms")
            report.at_most("a line from guest to client: median, ms", median(lines), 10.0)
            count = 4 if quick else 200
            seconds = asyncio.run(many_runs(supervised, api, short, count))
            report.figure(f"{count} runs, from requests to the last end", seconds, "s")
            report.figure("the same for each run", seconds / count * 1000, "ms")
    report.write(options.results)


if __name__ == "__main__":
    main()
