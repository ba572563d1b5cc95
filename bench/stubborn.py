"""One run that will not end, and whether anything else waits for it.

Floor: the same commands with no such run.
Target: list, start and cancel of other runs are answered, p99, within 1.5 times the same without
it, and no command takes a tenth of the stubborn run's grace.
How: the stubborn run is an agent that ignores SIGTERM; it is cancelled with a grace of a minute, so
all the time something inside the supervisor waits for it. Rounds without and with it in turns;
each command is timed from the client, until its answer and, for start and cancel, until the event
that says it is done.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from kit.measure import percentile, start_report
from kit.supervised import PATIENCE, TERMINAL, Supervised, descendants, ignores, kill

GRACE = 60.0
SPEC = """
kind: agent
name: stubborn
sandbox:
  mode: mock
  env: {CLAUDIO_TURNS: "1", CLAUDIO_HANG: "1"}
llm: {provider: claude}
agent:
  prompt: hang
"""

Times = defaultdict[str, list[float]]


def commands(supervised: Supervised, rounds: int, times: Times) -> None:
    """List, start another run, cancel it; milliseconds by what was waited for."""

    def note(what: str, since: float, until: float | None = None) -> None:
        times[what].append(((until or time.monotonic()) - since) * 1000)

    for _ in range(rounds):
        start = time.monotonic()
        supervised.list()
        note("list answered", start)
        start = time.monotonic()
        run_id = supervised.start()
        note("start answered", start)
        note("machine ready", start, supervised.events.wait(run_id, "sandbox.ready"))
        start = time.monotonic()
        supervised.cancel(run_id, grace=1.0)
        note("cancel answered", start)
        note("cancelled", start, supervised.events.wait(run_id, *TERMINAL))


def start_stubborn(supervised: Supervised, spec: Path) -> str:
    """A run that was told to end, and doesn't."""
    run_id = supervised.start(spec)
    supervised.events.wait(run_id, "stage.started", *TERMINAL)
    process = supervised.run_process(run_id)
    deadline = time.monotonic() + PATIENCE
    while not any(ignores(pid, signal.SIGTERM) for pid in descendants(process)):
        if time.monotonic() > deadline:
            raise TimeoutError("the agent never came to ignore SIGTERM")
        time.sleep(0.02)
    supervised.cancel(run_id, grace=GRACE)
    return run_id


def main() -> None:
    report, options = start_report(__file__, __doc__)
    turns, rounds = (1, 2) if options.quick else (6, 12)
    without: Times = defaultdict(list)
    beside: Times = defaultdict(list)
    with Supervised() as supervised, tempfile.TemporaryDirectory(prefix="vb-") as folder:
        spec = Path(folder) / "stubborn.yaml"
        spec.write_text(SPEC)
        commands(supervised, 1, defaultdict(list))  # warm
        for _ in range(turns):
            commands(supervised, rounds, without)
            stubborn = start_stubborn(supervised, spec)
            commands(supervised, rounds, beside)
            state = supervised.state(stubborn)
            if state.status.terminal or not state.cancelling:
                raise RuntimeError(f"the stubborn run is {state.status.value}, not being cancelled")
            kill(supervised.run_process(stubborn))
            supervised.events.wait(stubborn, *TERMINAL, timeout=PATIENCE)
    for what in without:
        for share in (0.5, 0.99):
            name = f"{what}, p{share * 100:g}"
            report.figure(f"{name}: without it", percentile(without[what], share), "ms")
            report.figure(f"{name}: beside it", percentile(beside[what], share), "ms")
    for what in ("list answered", "start answered", "cancel answered"):
        ratio = percentile(beside[what], 0.99) / percentile(without[what], 0.99)
        report.at_most(f"{what}, p99: ratio to without it", ratio, 1.5)
    longest = max(max(times) for times in beside.values())
    report.at_most("the longest wait beside it, ms", longest, GRACE * 100)
    report.write(options.results)


if __name__ == "__main__":
    main()
