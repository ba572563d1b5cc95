"""Service mode: what is published and when, and how the ends are told apart."""

from __future__ import annotations

import json

import pytest
from conductor_kit import FakeConductor

from voidbus.actors.workloads.agent_kinds import ClaudeCode
from voidbus.actors.workloads.agent_program import AgentSettings
from voidbus.actors.workloads.conductor import MachineRequest
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.providers import Launch
from voidbus.actors.workloads.service import REPUBLISH_SECONDS, AgentService
from voidbus.spec.run import SandboxSpec

FILE = "/workspace/out.md"
GOOD = json.dumps({"type": "result", "result": "bye", "usage": {"input_tokens": 3}}).encode()


def begin(*, patient: bool = False, watch_error: str | None = None) -> FakeConductor:
    conductor = FakeConductor(patient=patient or watch_error is not None)
    service = AgentService(
        "desk",
        AgentSettings("Serve.", Launch(ClaudeCode("claude-code")), timeout=0, output_file=FILE),
        conductor,
        machine=MachineRequest(SandboxSpec(), stage="desk"),
        outputs=OutputCollector(conductor, "r1"),
        input_text=None,
    )
    service.begin()
    if watch_error is not None:
        opened = conductor.machines[0]
        opened.machine.watch_error = watch_error
        opened.on_ready(opened.machine)
    conductor.settle()
    return conductor


def write(conductor: FakeConductor, content: bytes) -> None:
    conductor.files[FILE] = content
    conductor.machines[0].machine.watches[FILE]()


def test_the_file_is_watched_before_the_program_starts() -> None:
    conductor = begin()
    assert list(conductor.machines[0].machine.watches) == [FILE]
    assert conductor.commands["desk"].timeout == 0
    assert conductor.types() == [], "a service has no stages"


def test_the_file_is_published_as_soon_as_it_is_complete() -> None:
    conductor = begin()
    write(conductor, b'{"status": "ok"}')
    conductor.settle()
    ((output, report),) = conductor.published
    assert (output.stage, output.fault) == ("desk", None)
    assert (report.kind, report.name, report.output) == ("service", "desk", FILE)
    ready = conductor.event("run.output_ready")
    assert ready.payload["size_bytes"] == 16
    assert conductor.stages_running() == ["desk"], "it goes on"


def test_what_is_not_json_is_published_too() -> None:
    conductor = begin()
    write(conductor, b"# A report")
    conductor.settle()
    assert len(conductor.published) == 1
    assert conductor.event("run.output_ready").payload["structured"] is False


def test_it_is_published_again_when_it_has_changed_and_only_then() -> None:
    conductor = begin()
    write(conductor, b"one")
    conductor.settle()
    write(conductor, b"one")
    conductor.settle()
    conductor.pass_time()
    assert len(conductor.published) == 1
    write(conductor, b"two")
    conductor.settle()
    assert len(conductor.published) == 2
    assert conductor.types() == ["run.output_ready", "run.output_updated"]


def test_changes_while_one_is_being_read_are_read_once_more() -> None:
    conductor = begin()
    for text in (b"one", b"two", b"three"):
        write(conductor, text)
    conductor.settle()
    assert [kept.size_bytes for kept in conductor.stored] == [5], "the last one, once"
    assert len(conductor.published) == 1


def test_what_changes_all_the_time_is_published_once_a_second() -> None:
    conductor = begin()
    write(conductor, b"one")
    conductor.settle()
    for text in (b"two", b"three"):
        write(conductor, text)
        conductor.settle()
    assert len(conductor.published) == 1
    assert conductor.delays == [REPUBLISH_SECONDS]
    conductor.pass_time()
    assert len(conductor.published) == 2
    write(conductor, b"the last")
    conductor.end("desk", stdout=GOOD)
    assert len(conductor.published) == 3, "the end waits for nothing"


def test_an_empty_file_is_not_published() -> None:
    conductor = begin()
    write(conductor, b"")
    conductor.settle()
    assert conductor.published == []


def test_what_was_written_last_is_published_with_the_end() -> None:
    conductor = begin()
    conductor.files[FILE] = b"late"
    conductor.end("desk", stdout=GOOD)
    assert len(conductor.published) == 1
    verdict = conductor.verdict
    assert (verdict.success, verdict.reason) == (True, "service exited cleanly")
    assert verdict.report is not None
    assert (verdict.report.kind, verdict.report.output) == ("service", FILE)
    assert verdict.report.input_tokens == 3


def test_a_service_that_never_wrote_ends_well_with_its_words() -> None:
    conductor = begin()
    conductor.end("desk", stdout=GOOD)
    assert conductor.verdict.success
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "bye"


@pytest.mark.parametrize(
    ("stdout", "code", "error", "reason"),
    [
        (json.dumps({"type": "result", "is_error": True}).encode(), 0, None, "exited with error"),
        (json.dumps({"type": "system"}).encode(), 3, None, "exited with error"),
        (b"", -1, "Process killed by signal (exit_code mapped to -1)", "crashed"),
    ],
)
def test_an_error_exit_and_a_crash_are_told_apart(
    stdout: bytes, code: int, error: str | None, reason: str
) -> None:
    conductor = begin()
    conductor.end("desk", code, stdout=stdout, error=error)
    verdict = conductor.verdict
    assert (verdict.success, verdict.reason) == (False, f"service {reason}")


def test_a_machine_that_is_lost_is_a_crash_and_one_that_never_came_no_start() -> None:
    conductor = begin()
    conductor.machines[0].on_lost("the machine ended: killed")
    assert (conductor.verdict.reason, conductor.verdict.error) == (
        "service crashed",
        "the machine ended: killed",
    )
    conductor = begin(patient=True)
    conductor.machines[0].on_lost("the machine did not start: no image")
    assert conductor.verdict.reason == "service failed to start"


def test_what_was_published_stays_the_report_of_a_service_that_crashes() -> None:
    conductor = begin()
    write(conductor, b"one")
    conductor.settle()
    conductor.end("desk", -1, error="killed")
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == FILE


def test_a_file_that_cannot_be_watched_is_published_at_the_end_and_the_run_says_so() -> None:
    conductor = begin(watch_error="no room for one more watch")
    assert "no room for one more watch" in conductor.event("machine.warning").message
    conductor.files[FILE] = b"late"
    conductor.end("desk", stdout=GOOD)
    assert len(conductor.published) == 1
