"""What every bench does with its figures: interleave, take medians, print ratios, write JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def arguments(description: str | None) -> argparse.Namespace:
    """The options of every bench: `--quick`, and `--results DIR`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny: only shows that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    return parser.parse_args()


def installed(peer: str) -> bool:
    return importlib.util.find_spec(peer) is not None


def seconds(job: Callable[[], object]) -> float:
    """How long `job` takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def interleave(
    rounds: int, jobs: Mapping[str, Callable[[], float]], *, warm: bool = True
) -> dict[str, list[float]]:
    """Measure every job once a round, in turns, so that what else the machine does hits all.

    Every second round goes backwards, so that none always follows the same other one.
    """
    if warm:
        for job in jobs.values():
            job()
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        names = list(jobs) if number % 2 == 0 else list(jobs)[::-1]
        for name in names:
            found[name].append(jobs[name]())
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


@dataclass
class Report:
    """A bench's figures and how they stand to its targets."""

    name: str
    quick: bool
    figures: dict[str, Any] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str, value: float | str | None, unit: str = "") -> None:
        self.figures[name] = value
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value}"
        print(f"  {name:<58} {shown:>12} {unit}", flush=True)

    def at_least(self, what: str, value: float, wanted: float) -> None:
        self._target(what, value, ">=", wanted, value >= wanted)

    def at_most(self, what: str, value: float, wanted: float) -> None:
        self._target(what, value, "<=", wanted, value <= wanted)

    def exactly(self, what: str, value: float, wanted: float) -> None:
        self._target(what, value, "==", wanted, value == wanted)

    def _target(self, what: str, value: float, sign: str, wanted: float, met: bool) -> None:
        self.targets.append(
            {"what": what, "value": value, "sign": sign, "wanted": wanted, "met": met}
        )
        verdict = "met" if met else "MISSED"
        print(f"  {what:<58} {value:>12,.4g} (target {sign} {wanted:g}: {verdict})", flush=True)

    def leave_out(self, peer: str, why: str = "not installed; bench/setup installs it") -> None:
        """Say that a peer is not measured here."""
        self.left_out[peer] = why
        print(f"  {peer} left out: {why}", flush=True)

    def write(self, folder: Path) -> None:
        """Write `NAME.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "name": self.name,
            "quick": self.quick,
            "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": {
                "cpus": os.cpu_count(),
                "load": os.getloadavg()[0],
                "kernel": platform.release(),
                "python": platform.python_version(),
            },
            "figures": self.figures,
            "targets": self.targets,
            "left_out": self.left_out,
        }
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
        print(f"  -> {path}", flush=True)


def start_report(path: str, description: str | None) -> tuple[Report, argparse.Namespace]:
    """Read the options and print which bench this is."""
    options = arguments(description)
    report = Report(Path(path).stem, options.quick)
    first = (description or "").strip().splitlines()[0]
    print(f"{report.name}: {first}" + (" (quick)" if options.quick else ""), flush=True)
    return report, options


def import_from_bench() -> None:
    """Let processes started from here import what is in bench/."""
    folder = str(Path(__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*known, folder]))
