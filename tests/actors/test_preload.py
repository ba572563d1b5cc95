from __future__ import annotations

import subprocess
import sys

from voidbus.actors.run_process import PRELOAD

# What a run process does first: it takes a machine of some kind.
_SCRIPT = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
before = set(sys.modules)
from voidbus.vm.machine import MachineError
from voidbus.vm.select import select_machine
for mode in ("auto", "kvm", "qemu", "mock"):
    try:
        select_machine(mode)
    except MachineError:
        pass
print(*sorted(set(sys.modules) - before))
"""


def test_a_run_process_finds_imported_what_makes_its_machine() -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-c", _SCRIPT, *PRELOAD],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.split() == []
