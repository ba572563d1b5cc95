"""Kind sandbox: shows that programs run, and then only waits."""

from __future__ import annotations

from conductor_kit import FakeConductor

from voidbus.actors.workloads.conductor import MachineRequest
from voidbus.actors.workloads.sandbox import Sandbox
from voidbus.spec.run import SandboxSpec


def begin() -> tuple[FakeConductor, Sandbox]:
    conductor = FakeConductor()
    sandbox = Sandbox(conductor, MachineRequest(SandboxSpec()), {"A": "b"})
    sandbox.begin()
    return conductor, sandbox


def test_it_says_ready_once_a_program_ran_and_does_not_finish() -> None:
    conductor, _ = begin()
    command = conductor.commands["main"]
    assert (command.program, command.args, command.env) == ("echo", ("ready",), {"A": "b"})
    assert 0 < command.timeout <= 60, "a guest that hangs is noticed"
    conductor.end("main", stdout=b"ready\n")
    assert conductor.types() == ["sandbox.ready"]
    assert conductor.logged == [("main", "stdout", b"ready\n")]
    assert conductor.verdicts == []
    assert conductor.open_stages() == [], "it has no stages"


def test_a_sandbox_that_runs_no_programs_fails_with_the_reason() -> None:
    conductor, _ = begin()
    conductor.end("main", 1)
    assert conductor.verdict.error == ("the sandbox runs no programs: echo ended with exit code 1")
    conductor, _ = begin()
    conductor.end("main", -1, error="could not start 'echo'")
    assert not conductor.verdict.success
    assert conductor.verdict.error == "the sandbox runs no programs: could not start 'echo'"
