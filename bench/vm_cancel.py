"""How long a service in a virtual machine takes to be gone once it is cancelled by HTTP.

Floor: the same cancel of a service on the process machine.
Target: at most a second, until the answer, which comes when the machine is gone.
How: a service that publishes, started and cancelled by the HTTP API; medians and the longest.
"""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

from kit.machines import START_SECONDS, machines_work
from kit.measure import start_report
from kit.supervised import TERMINAL, Supervised

SPEC = {
    "kind": "agent",
    "name": "desk",
    "llm": {"provider": "claude"},
    "agent": {"prompt": "serve", "mode": "service", "output_file": "/workspace/report.json"},
}
SERVE = {"CLAUDIO_TURNS": "100000", "CLAUDIO_DELAY_MS": "200", "CLAUDIO_SERVE": "1"}


def cancel(path: Path, run_id: str) -> float:
    """Cancel a run by HTTP; the seconds until the answer."""
    connection = http.client.HTTPConnection("voidbus", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(60)
        connection.sock.connect(str(path))
        began = time.monotonic()
        connection.request("POST", f"/v1/runs/{run_id}/cancel", b"{}")
        answer = json.loads(connection.getresponse().read())
        took = time.monotonic() - began
    finally:
        connection.close()
    if answer["state"] != "cancelled":
        raise RuntimeError(f"the cancel of {run_id} was answered with {answer}")
    return took


def cancels(supervised: Supervised, api: Path, folder: Path, mode: str, rounds: int) -> list[float]:
    spec = folder / f"{mode}.json"
    sandbox = {"mode": mode, "memory_mb": 512, "env": SERVE}
    spec.write_text(json.dumps({**SPEC, "sandbox": sandbox}))
    took = []
    for _ in range(rounds):
        run_id = supervised.start(spec)
        supervised.events.wait(run_id, "run.output_ready", *TERMINAL, timeout=START_SECONDS)
        took.append(cancel(api, run_id))
    return took


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not machines_work(report):
        report.write(options.results)
        return
    rounds = 1 if options.quick else 8
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        folder = Path(name)
        api = folder / "api"
        with Supervised(VOIDBUS_API__LISTEN=f"unix://{api}") as supervised:
            floor = cancels(supervised, api, folder, "mock", rounds)
            found = cancels(supervised, api, folder, "qemu", rounds)
    report.figure("on the process machine, median", median(floor), "s")
    report.figure("in a virtual machine, median", median(found), "s")
    report.figure("ratio of the medians", median(found) / median(floor))
    report.at_most("the longest in a virtual machine, s", max(found), 1.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
