"""Every file of configs/ does what it says, on a real supervisor, all of them at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_kit import CONFIGS, Client, running_supervisor

from voidbus.actors.messages.runs import RunState, RunStatus, StartRun
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.spec.loader import load_run_spec
from voidbus.spec.supervisor import load_supervisor_config
from voidbus.transport.fault import BusError

MOCK_FILES = ("agent.json", "sandbox.yaml")
MACHINE_FILES = ("agent.yaml", "workflow.yaml")
OTHERS = ("pipeline.yaml", "supervisor.yaml")
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


def test_the_pipeline_is_valid_and_refused_with_what_to_use_instead(client: Client) -> None:
    load_run_spec(CONFIGS / "pipeline.yaml")
    words = "kind: pipeline is not run by this release; use kind: workflow, or one run for each box"
    with pytest.raises(BusError, match=re.escape(words)):
        client.ask("runs", StartRun(file=str(CONFIGS / "pipeline.yaml")))
    run_id = client.start(CONFIGS / "pipeline.yaml", strict=False)
    state = ended(client, run_id)
    assert (state.status, state.error) == (RunStatus.FAILED, words)


def test_the_supervisors_configuration_is_the_defaults_it_documents(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert load_supervisor_config(CONFIGS / "supervisor.yaml", environ, {}) == (
        load_supervisor_config(None, environ, {})
    )


def test_no_file_names_a_secret() -> None:
    for path in CONFIGS.iterdir():
        assert not re.search(r"sk-[A-Za-z0-9]|BEGIN .*KEY", path.read_text()), path
    json.loads((CONFIGS / "agent.json").read_text())
