"""`--json`: the fields of each command's document are those of docs/cli.md, and no others.

What needs a guest image or a run's files is pinned beside those: test_cli_image.py,
test_cli_artifacts.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor

from voidbus.actors.messages.actor import Accepted, ActorStatus
from voidbus.actors.messages.runs import ConsoleText, ReadConsole, RunEvent, RunState
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.sidecar.model import Intent
from voidbus.transport.delivery import Delivery

Voidbus = Callable[..., Any]

PROBLEM = {"level", "line", "column", "field", "message", "found", "allowed", "suggestion"}
SIDECAR = {"status", "buffer_depth", "inbox_version"}
RUN = set(RunState.model_fields)
SPEC = {
    "kind": "workflow",
    "name": "w",
    "sandbox": {"mode": "mock"},
    "workflow": {"steps": [{"name": "a", "run": {"program": "true"}, "stdn": "x"}]},
}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC))
    return path


def document_of(voidbus: Voidbus, *arguments: object) -> Any:
    result = voidbus(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_validate(voidbus: Voidbus, spec: Path) -> None:
    document = document_of(voidbus, "validate", spec)
    assert set(document) == {"ok", "files"}
    [file] = document["files"]
    assert set(file) == {"file", "ok", "digest", "problems"}
    assert [set(problem) for problem in file["problems"]] == [PROBLEM], "a warning"


def test_version(voidbus: Voidbus) -> None:
    fields = {"voidbus", "python", "pyzmq", "libzmq", "kernel"}
    assert set(document_of(voidbus, "version")) == fields


def test_keys(voidbus: Voidbus, state: Path, tmp_path: Path) -> None:
    server = document_of(voidbus, "keys", "server")
    assert set(server) == {"public_key", "folder"}
    assert server["folder"] == str(state / "keys")
    assert voidbus("keys", "server").out == server["public_key"] + "\n"
    target = tmp_path / "ann.keys"
    client = document_of(voidbus, "keys", "client", "ann", "--out", target)
    kept = json.loads(target.read_text())
    assert client == {
        "name": "ann",
        "right": "observe",
        "file": str(target),
        "public_key": kept["public"],
    }
    assert kept["secret"] not in json.dumps(client)


def test_run_and_cancel(voidbus: Voidbus, supervisor: FakeSupervisor, spec: Path) -> None:
    detached = document_of(voidbus, "run", spec, "--detach")
    assert set(detached) == {"run_id", "attempt_id", "state", "existing", "warnings"}
    supervisor.add_run("run-a")
    for arguments in (("run-a", "--no-wait"), ("run-a",)):
        cancelled = document_of(voidbus, "cancel", *arguments)
        assert set(cancelled) == {"runs"}
        assert [set(run) for run in cancelled["runs"]] == [{"run_id", "state", "terminal_event_id"}]


def test_ps_and_inspect(voidbus: Voidbus, supervisor: FakeSupervisor) -> None:
    supervisor.add_run("run-a")
    listed = document_of(voidbus, "ps")
    assert set(listed) == {"runs", "total"}
    assert [set(run) for run in listed["runs"]] == [RUN]
    assert set(document_of(voidbus, "inspect", "run-a")) == RUN | {"sidecar"}


@pytest.mark.parametrize("command", ["events", "logs"])
def test_events_and_logs(voidbus: Voidbus, supervisor: FakeSupervisor, command: str) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "log.chunk", stream="stdout", payload={"data": "x"})
    supervisor.emit("run-a", "run.finished")
    document = document_of(voidbus, command, "run-a")
    assert set(document) == {"run_id", "events", "last_seq", "ended"}
    lines = voidbus(command, "run-a", "--follow", "--json").out.splitlines()
    for event in (*document["events"], *map(json.loads, lines)):
        assert set(event) == set(RunEvent.model_fields)


def test_console(voidbus: Voidbus, supervisor: FakeSupervisor) -> None:
    supervisor.add_run("run-a")
    supervisor.answers[ReadConsole] = lambda delivery: delivery.reply(ConsoleText(text="\x1b[2J"))
    document = document_of(voidbus, "console", "run-a")
    assert document == {"run_id": "run-a", "console": "\x1b[2J"}


def test_telemetry(voidbus: Voidbus, supervisor: FakeSupervisor) -> None:
    supervisor.add_run("run-a")
    document = document_of(voidbus, "telemetry", "run-a")
    assert set(document) == {"run_id", "next_seq", "samples"}
    fields = {"seq", "timestamp_ms", "stage_name", "guest", "host"}
    assert [set(sample) for sample in document["samples"]] == [fields]


def test_inbox_message_and_intents(
    voidbus: Voidbus, supervisor: FakeSupervisor, tmp_path: Path
) -> None:
    supervisor.add_run("run-a")
    supervisor.intents["run-a"] = (
        Intent(
            intent_id="int-1",
            from_candidate_id="c",
            iteration=0,
            kind="signal",
            audience="leader",
            payload="x",
            priority="low",
        ),
    )
    inbox = tmp_path / "inbox.json"
    inbox.write_text(
        json.dumps({"execution_id": "e", "candidate_id": "c", "iteration": 1, "entries": []})
    )
    assert set(document_of(voidbus, "inbox", "put", "run-a", inbox)) == SIDECAR
    message = ("message", "run-a", "--kind", "signal", "--summary", "x")
    assert set(document_of(voidbus, *message)) == SIDECAR
    document = document_of(voidbus, "intents", "run-a")
    assert set(document) == {"run_id", "intents"}
    assert [set(intent) for intent in document["intents"]] == [set(Intent.model_fields)]


def test_actors(voidbus: Voidbus, supervisor: FakeSupervisor) -> None:
    document = document_of(voidbus, "actors")
    assert set(document) == {"systems", "unreachable"}
    [system] = document["systems"]
    assert set(system) == {"node", "pid", "threads", "counters", "actors"}
    assert all(set(actor) == set(ActorStatus.model_fields) for actor in system["actors"])


def test_stop(voidbus: Voidbus, state: Path) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
        FakeSupervisor(state, pid=process.pid) as supervisor,
    ):
        supervisor.add_run("run-a")

        def end(delivery: Delivery) -> None:
            delivery.reply(Accepted(operation="stop"))
            process.communicate(b"\n")

        supervisor.answers[StopSupervisor] = end
        document = document_of(voidbus, "stop", "--runs", "leave")
    assert set(document) == {"pid", "stopped", "seconds", "runs"}
    assert (document["pid"], document["stopped"]) == (process.pid, True)
    assert document["runs"] == {"run-a": "left"}


def test_results_are_one_document_and_errors_none(
    voidbus: Voidbus, supervisor: FakeSupervisor
) -> None:
    commands: Sequence[tuple[str, ...]] = (
        ("inspect", "nobody"),
        ("events", "nobody"),
        ("cancel", "nobody"),
        ("intents", "nobody"),
    )
    for command in commands:
        result = voidbus(*command, "--json")
        assert (result.code, result.out) == (4, "")
