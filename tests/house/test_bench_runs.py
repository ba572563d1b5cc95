"""Every bench still runs: in its quick mode, with or without the peers it measures against."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = sorted(path.stem for path in BENCH.glob("*.py"))


def marks(name: str) -> list[pytest.MarkDecorator]:
    """What a bench needs of the machine it runs on."""
    match name:
        case "kvm_setup":
            return [pytest.mark.needs("kvm")]
        case "kvm_machine":
            return [pytest.mark.needs("kvm-hardware", "vm"), pytest.mark.timeout(600)]
        case "kvm_mounts":
            needed = ("kvm-hardware", "virtiofsd", "vm")
            return [pytest.mark.needs(*needed), pytest.mark.timeout(200)]
        case _ if name.startswith("vm_"):
            return [pytest.mark.needs("vm"), pytest.mark.timeout(200)]
    return []


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_a_bench_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500.0 if "_machine" in name else 180.0 if "vm_" in name else 50.0,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["figures"]
    assert written["targets"], "a bench says what it wants"
    for target in written["targets"]:
        assert target["what"] in ended.stdout


def test_every_bench_is_run_by_the_script_and_says_what_it_measures() -> None:
    script = (BENCH / "run").read_text()
    for name in NAMES:
        assert f" {name}" in script or f"({name}" in script
        text = (BENCH / f"{name}.py").read_text()
        assert "Target" in text
        assert "How:" in text
