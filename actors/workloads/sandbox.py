"""Kind `sandbox`: a machine that is there until the run is cancelled."""

from __future__ import annotations

from voidbus.actors.workloads.conductor import (
    Command,
    Conductor,
    Exit,
    GuestMachine,
    MachineRequest,
    Verdict,
    Workload,
)


class Sandbox(Workload):
    """Shows that programs run, then waits."""

    def __init__(self, conductor: Conductor, machine: MachineRequest, env: dict[str, str]) -> None:
        self._conductor = conductor
        self._request = machine
        self._env = env

    def begin(self) -> None:
        self._conductor.open_machine(self._request, self._try, self._lost)

    def _try(self, machine: GuestMachine) -> None:
        machine.execute(
            "main",
            Command("echo", ("ready",), self._env, timeout=60),
            lambda stream, data: self._conductor.log("main", stream, data),
            self._ready,
        )

    def _lost(self, reason: str) -> None:
        self._conductor.finish(Verdict(False, None, reason))

    def _ready(self, end: Exit) -> None:
        if end.succeeded:
            self._conductor.emit("sandbox.ready", "the sandbox is ready; cancel the run to end it")
        else:
            why = end.error or f"echo ended with exit code {end.exit_code}"
            self._conductor.finish(Verdict(False, None, f"the sandbox runs no programs: {why}"))
