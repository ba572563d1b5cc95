"""A cold `voidbus ps` against a running supervisor: from execution to its end.

Floor: `python -c pass` with the same interpreter.
Target: p50 of 20 within 250 ms.
How: both in turns, each a process of its own, as a shell would start them; `voidbus --version`,
which asks nobody, shows what is the imports' and what is the question's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kit.measure import interleave, percentile, seconds, start_report
from kit.supervised import PATIENCE, Supervised


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)


def main() -> None:
    report, options = start_report(__file__, __doc__)
    rounds = 2 if options.quick else 20
    program = str(Path(sys.executable).with_name("voidbus"))
    with Supervised() as supervised:
        supervised.start_ready(1)
        place = str(supervised.state_dir)
        found = interleave(
            rounds,
            {
                "voidbus ps": lambda: seconds(lambda: run(program, "ps", "--state-dir", place)),
                "voidbus --version": lambda: seconds(lambda: run(program, "--version")),
                "python -c pass": lambda: seconds(lambda: run(sys.executable, "-c", "pass")),
            },
        )
    for name, times in found.items():
        for share in (0.5, 0.99):
            value = percentile(times, share) * 1000
            report.figure(f"{name}, p{share * 100:g} of {rounds}", value, "ms")
    middle = {name: percentile(times, 0.5) for name, times in found.items()}
    ratio = middle["voidbus ps"] / middle["python -c pass"]
    report.figure("voidbus ps: ratio to python -c pass", ratio)
    report.at_most("voidbus ps, p50, ms", middle["voidbus ps"] * 1000, 250.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
