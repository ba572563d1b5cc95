"""Every file of configs/ does what it says, on a real supervisor, all of them at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_kit import CONFIGS, Client, running_supervisor

from voidbus.actors.messages.artifacts import ReadArtifact
from voidbus.actors.messages.runs import RunState, RunStatus
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.spec.supervisor import load_supervisor_config

MOCK_FILES = ("agent.json", "pipeline.yaml", "sandbox.yaml")
MACHINE_FILES = ("agent.yaml", "service.yaml", "workflow.yaml")
OTHERS = ("supervisor.yaml",)
PATIENCE = 120.0  # a machine may be an emulated one on a busy host

in_a_machine = pytest.mark.needs("vm")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running_supervisor() as supervisor, supervisor.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def runs(client: Client) -> dict[str, str]:
    """Those without a machine, started before any is waited for."""
    return {name: client.start(CONFIGS / name) for name in MOCK_FILES}


def ended(client: Client, run_id: str) -> RunState:
    state = client.wait_end(run_id, PATIENCE)
    seqs = [event.seq for event in client.events(run_id)]
    assert seqs == list(range(len(seqs)))
    return state


def test_every_file_is_accounted_for() -> None:
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(
        (*MOCK_FILES, *MACHINE_FILES, *OTHERS)
    )


@in_a_machine
@pytest.mark.timeout(240)
def test_the_agent_sends_its_intent_and_writes_its_output(client: Client) -> None:
    run_id = client.start(CONFIGS / "agent.yaml")
    state = ended(client, run_id)
    assert state.status is RunStatus.SUCCEEDED, state.error
    assert state.report is not None
    assert (state.report.kind, state.report.name, state.report.stages) == ("agent", "scout", 1)
    assert state.report.input_tokens > 0
    intents = client.ask("runs", ReadIntents(run_id=run_id, drain=True))
    assert isinstance(intents, IntentList)
    assert len(intents.intents) == 1
    events = client.events(run_id)
    mounted = next(event for event in events if event.event_type == "skill.mounted")
    assert (mounted.skill_type, mounted.skill_id) == ("agent", "claude-code")


def test_the_agent_in_json_runs_as_one_in_yaml(client: Client, runs: dict[str, str]) -> None:
    state = ended(client, runs["agent.json"])
    assert state.status is RunStatus.SUCCEEDED, state.error
    assert state.report is not None
    assert state.report.name == "scout-json"


@in_a_machine
@pytest.mark.timeout(240)
def test_the_diamond_ends_with_what_its_report_step_read(client: Client) -> None:
    state = ended(client, client.start(CONFIGS / "workflow.yaml"))
    assert state.status is RunStatus.SUCCEEDED, state.error
    assert state.report is not None
    assert state.report.output == "HELLO FROM VOIDBUS\n"
    assert state.report.stages == 4
    groups = {e.stage_name: e.group_id for e in client.events(state.id) if e.stage_name}
    assert {"greet": "g0", "shout": "g1", "count": "g1", "report": "g2"}.items() <= groups.items()


def test_the_sandbox_is_there_until_it_is_cancelled(client: Client, runs: dict[str, str]) -> None:
    run_id = runs["sandbox.yaml"]
    client.wait_type(run_id, "sandbox.ready", patience=PATIENCE)
    assert client.state(run_id).status is RunStatus.RUNNING
    client.cancel(run_id, "seen enough")
    state = ended(client, run_id)
    assert (state.status, state.terminal_reason) == (RunStatus.CANCELLED, "seen enough")


def test_the_pipelines_boxes_run_one_then_two_and_leave_their_output(
    client: Client, runs: dict[str, str]
) -> None:
    run_id = runs["pipeline.yaml"]
    state = ended(client, run_id)
    assert state.status is RunStatus.SUCCEEDED, state.error
    assert state.report is not None
    assert (state.report.kind, state.report.stages) == ("pipeline", 3)
    started = [e.stage_name for e in client.events(run_id) if e.event_type == "stage.started"]
    assert started[0] == "planner"
    assert sorted(map(str, started[1:])) == ["reader", "tester"]
    published = state.artifact_publication
    assert published.status == "published"
    assert published.manifest[0].stage == "planner"
    assert {entry.name for entry in published.manifest} == {"result.json"}


@in_a_machine
@pytest.mark.timeout(240)
def test_the_service_publishes_while_it_runs_and_is_cancelled_at_once(client: Client) -> None:
    """In a machine: seen by notification in the guest while its exec occupies it."""
    run_id = client.start(CONFIGS / "service.yaml")
    client.wait_type(run_id, "run.output_ready", patience=PATIENCE)
    state = client.state(run_id)
    assert (state.status, state.output_ready) == (RunStatus.RUNNING, True)
    (entry,) = state.artifact_publication.manifest
    first = content(client, run_id, "desk")
    assert entry.size_bytes == len(first)
    assert json.loads(first)["status"] == "serving"
    client.wait_type(run_id, "run.output_updated", patience=PATIENCE)
    assert json.loads(content(client, run_id, "desk"))["turn"] > json.loads(first)["turn"]
    client.cancel(run_id, "seen enough")
    state = ended(client, run_id)
    assert (state.status, state.terminal_reason) == (RunStatus.CANCELLED, "seen enough")
    assert state.artifact_publication.status == "published", "what was published stays"
    assert json.loads(content(client, run_id, "desk"))["status"] == "serving"


def content(client: Client, run_id: str, stage: str) -> bytes:
    """The output file of a stage."""
    asked = client.leaf.ask(
        "supervisor/archive", ReadArtifact(run_id=run_id, stage=stage), timeout=PATIENCE
    )
    asked.result()
    return asked.attachments[0]


def test_the_supervisors_configuration_is_the_defaults_it_documents(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert load_supervisor_config(CONFIGS / "supervisor.yaml", environ, {}) == (
        load_supervisor_config(None, environ, {})
    )


def test_no_file_names_a_secret() -> None:
    for path in CONFIGS.iterdir():
        assert not re.search(r"sk-[A-Za-z0-9]|BEGIN .*KEY", path.read_text()), path
    json.loads((CONFIGS / "agent.json").read_text())
