"""A supervisor that is killed with 1, 20 and 100 runs, and the next one: how soon it has them all.

No peer: void-box fails every run when its daemon restarts; circus and xoscar start others.
Targets: every run adopted within 2 seconds of the new supervisor's execution; none orphaned.
How: SIGKILL to the supervisor, then at once a new one on the same state directory. The clock runs
from its execution until every run's node has answered through it; each run process must be the one
it was before. Then all runs are cancelled, and no process of theirs may be left.
"""

from __future__ import annotations

import time

from kit.measure import Report, start_report
from kit.supervised import (
    PATIENCE,
    TERMINAL,
    Supervised,
    descendants,
    parent_and_state,
)

from voidbus.actors.messages.actor import InspectSystem, SystemStatus
from voidbus.actors.messages.runs import run_node


def wait_answering(supervised: Supervised, runs: list[str]) -> dict[str, int]:
    """Ask every run's node until each has answered; its pid by run."""
    found: dict[str, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < len(runs):
        if time.monotonic() > deadline:
            missing = [run_id for run_id in runs if run_id not in found]
            raise TimeoutError(f"{len(missing)} runs did not come back, {missing[0]} among them")
        asked = {
            run_id: supervised.leaf.ask(f"{run_node(run_id)}/system", InspectSystem(), timeout=5.0)
            for run_id in runs
            if run_id not in found
        }
        for run_id, ask in asked.items():
            outcome = ask.wait()
            if isinstance(outcome, SystemStatus):
                found[run_id] = outcome.pid
        time.sleep(0.005)
    return found


def adopt(report: Report, count: int) -> None:
    with Supervised() as supervised:
        start = time.monotonic()
        runs = supervised.start_ready(count)
        report.figure(f"{count} runs: to start them all", time.monotonic() - start, "s")
        before = {run_id: supervised.run_process(run_id) for run_id in runs}
        below = [pid for process in before.values() for pid in descendants(process)]
        supervised.kill()
        moment = supervised.launch()
        supervised.leaf.wait_up(PATIENCE)
        link = time.monotonic() - moment
        after = wait_answering(supervised, runs)
        took = time.monotonic() - moment
        adopted = supervised.wait_adopted(count)
        start = time.monotonic()
        for run_id in runs:
            supervised.cancel(run_id, grace=5.0)
        for run_id in runs:
            supervised.events.wait(run_id, *TERMINAL)
        report.figure(f"{count} runs: to cancel them all", time.monotonic() - start, "s")
    left = [pid for pid in (*before.values(), *below) if parent_and_state(pid)[1] not in "ZX"]
    report.figure(f"{count} runs: the supervisor takes commands", link, "s")
    report.exactly(f"{count} runs: adopted, by the supervisor's count", adopted, count)
    same = sum(after[run_id] == before[run_id] for run_id in runs)
    report.exactly(f"{count} runs: in the process they were in", same, count)
    report.exactly(f"{count} runs: processes left when all are cancelled", len(left), 0)
    report.at_most(f"{count} runs: all adopted, seconds", took, 2.0)


def main() -> None:
    report, options = start_report(__file__, __doc__)
    for count in (1, 3) if options.quick else (1, 20, 100):
        adopt(report, count)
    report.write(options.results)


if __name__ == "__main__":
    main()
