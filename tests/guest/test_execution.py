"""What a program printed before its end, and what others print after it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from voidbus.vm.guest import execution
from voidbus.vm.guest.descendants import Children
from voidbus.vm.guest.exec_messages import ExecChunk, ExecRequest, ExecResponse
from voidbus.vm.guest.execution import Execution
from voidbus.vm.guest.place import Place


class SlowHost:
    """Takes the first piece of output only when the program has ended."""

    def __init__(self, folder: Path, script: str) -> None:
        place = Place(str(folder))
        place.prepare()
        request = ExecRequest("sh", ("-c", script))
        self._execution = Execution(request, place, Children(), None, 1 << 20, 4096)
        self.taken = b""

    def run(self) -> ExecResponse:
        return self._execution.run(self._emit)

    def _emit(self, chunk: ExecChunk) -> None:
        if not self.taken:
            child = self._execution._child
            assert child is not None
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        self.taken += chunk.data


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host so busy that the time to drain has passed before anything is read."""
    monkeypatch.setattr(execution, "DRAIN_SECONDS", 0.0)


def test_what_a_program_printed_arrives_however_late_it_is_read(tmp_path: Path) -> None:
    host = SlowHost(tmp_path, "head -c 50000 /dev/zero; head -c 9000 /dev/zero >&2")
    response = host.run()
    assert (len(response.stdout), len(response.stderr)) == (50_000, 9_000)
    assert len(host.taken) == 59_000


def test_a_program_left_behind_that_prints_for_ever_ends_nothing_late(tmp_path: Path) -> None:
    script = "yes & echo $! > pid; head -c 60000 /dev/zero >&2"
    host = SlowHost(tmp_path, script)
    try:
        response = host.run()
    finally:
        pid = int((tmp_path / "workspace/pid").read_text())
        with contextlib.suppress(ProcessLookupError):  # it may have met its closed pipe
            os.kill(pid, 9)
    assert response.exit_code == 0
    assert len(response.stderr) == 60_000
    # A pipe holds 64 KiB (pipe(7)), and the first piece was taken before the end.
    assert len(response.stdout) <= 65536 + 4096
