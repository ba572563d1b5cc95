"""Commands that change something: run, cancel, inbox, message, intents, stop."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.runs import CancelAccepted, CancelRun, ReadEvents, StartRun
from voidbus.actors.messages.sidecar import PushMessage, PutInbox, ReadIntents
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.cli import cancel
from voidbus.sidecar.model import Intent
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason

Voidbus = Callable[..., Any]

SPEC = """\
api_version: v1
kind: workflow
name: hello
sandbox:
  mode: mock
workflow:
  steps:
    - name: greet
      run:
        program: echo
        args: [hello]
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "hello.yaml"
    file.write_text(SPEC)
    return file


@pytest.fixture
def intent() -> Intent:
    return Intent(
        intent_id="int-1",
        from_candidate_id="candidate",
        iteration=0,
        kind="signal",
        audience="broadcast",
        payload={"summary_text": "found \x1b[1mit"},
        priority="normal",
    )


def ends_with(supervisor: FakeSupervisor, event_type: str) -> threading.Thread:
    """Ends the run that is started next, when somebody follows it."""

    def end() -> None:
        supervisor.wait_for(ReadEvents)
        supervisor.report("run-new", "the result")
        supervisor.emit("run-new", "log.chunk", payload={"data": "hello"}, stage_name="greet")
        supervisor.emit("run-new", event_type, "because")

    thread = threading.Thread(target=end)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("event_type", "code"), [("run.finished", 0), ("run.failed", 1), ("run.cancelled", 5)]
)
def test_run_follows_and_exits_with_what_the_run_came_to(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path, event_type: str, code: int
) -> None:
    thread = ends_with(supervisor, event_type)
    result = voidbus("run", spec)
    thread.join()
    assert result.code == code
    assert "the result\n" in result.out
    assert "120 tokens in, 45 tokens out, $0.0125" in result.out
    assert "[greet] | hello\n" in result.err
    assert "\x1b" not in result.out + result.err


def test_run_shows_the_intents_that_were_sent_and_leaves_them(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path, intent: Intent
) -> None:
    supervisor.intents["run-new"] = (intent,)
    thread = ends_with(supervisor, "run.finished")
    result = voidbus("run", spec)
    thread.join()
    assert "signal  broadcast  normal    0          int-1   found \\x1b[1mit\n" in result.out
    asked = supervisor.wait_for(ReadIntents)
    assert isinstance(asked, ReadIntents)
    assert not asked.drain


def test_run_json_is_one_document_with_the_run_and_its_intents(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path, intent: Intent
) -> None:
    supervisor.intents["run-new"] = (intent,)
    thread = ends_with(supervisor, "run.finished")
    result = voidbus("run", spec, "--json")
    thread.join()
    document = json.loads(result.out)
    assert document["status"] == "succeeded"
    assert document["report"]["output"] == "the result"
    assert document["intents"][0]["intent_id"] == "int-1"
    assert result.err == ""


def test_run_detached_prints_the_id_and_leaves(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path, tmp_path: Path
) -> None:
    (tmp_path / "input").write_text("from a file")
    result = voidbus(
        *("run", spec, "--detach", "--run-id", "mine"),
        *("--input", f"@{tmp_path / 'input'}", "--policy", "stage_timeout_secs=5"),
    )
    assert (result.code, result.out, result.err) == (0, "mine\n", "")
    asked = supervisor.wait_for(StartRun)
    assert isinstance(asked, StartRun)
    assert asked.strict
    assert (asked.file, asked.input) == (str(spec), "from a file")
    assert asked.policy == {"stage_timeout_secs": 5}


def test_run_reads_its_input_from_standard_input(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grüße".encode())))
    assert voidbus("run", spec, "--detach", "--input", "-", "--json").code == 0
    asked = supervisor.wait_for(StartRun)
    assert isinstance(asked, StartRun)
    assert asked.input == "grüße"


def test_a_bad_specification_is_refused_with_its_place_and_nothing_is_asked(
    supervisor: FakeSupervisor, voidbus: Voidbus, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("api_version: v1\nkind: agnt\nname: x\n")
    result = voidbus("run", bad)
    assert result.code == 2
    assert f"{bad}:2:7: kind: " in result.err
    assert result.err.splitlines()[-1].endswith("1 error; nothing was started")
    assert supervisor.asked == []
    assert voidbus("run", tmp_path / "absent.yaml").code == 2


def test_a_specification_the_supervisor_refuses_exits_with_2(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path
) -> None:
    supervisor.answers[StartRun] = lambda delivery: delivery.fail(
        FaultReason.INVALID, "skill file:/x: no such file on the supervisor's host"
    )
    result = voidbus("run", spec)
    assert result.code == 2
    assert result.err == "voidbus: error: skill file:/x: no such file on the supervisor's host\n"


@pytest.mark.parametrize(
    "policy", ["stage_timeout=5", "stage_timeout_secs=soon", "max_parallel_microvms_per_run=0"]
)
def test_a_bad_policy_is_wrong_usage(
    supervisor: FakeSupervisor, voidbus: Voidbus, spec: Path, policy: str
) -> None:
    result = voidbus("run", spec, "--policy", policy)
    assert result.code == 2
    assert policy.partition("=")[0] in result.err


def test_validate_reports_every_file(voidbus: Voidbus, spec: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: agent\nname: [\n")
    good = voidbus("validate", spec)
    assert (good.code, good.out) == (0, f"{spec}: ok\n")
    result = voidbus("validate", spec, bad)
    assert result.code == 2
    assert f"{bad}:" in result.err
    document = json.loads(voidbus("validate", spec, bad, "--json").out)
    assert [file["ok"] for file in document["files"]] == [True, False]
    assert document["files"][1]["problems"][0]["level"] == "error"


def test_cancel_waits_until_the_run_has_ended(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a")
    supervisor.add_run("run-b", "succeeded")
    result = voidbus("cancel", "run-a", "run-b", "--reason", "enough", "--grace", 0.5)
    assert result.code == 0
    assert result.out == "run-a cancelled\nrun-b had ended already: succeeded\n"
    asked = supervisor.wait_for(CancelRun)
    assert isinstance(asked, CancelRun)
    assert (asked.reason, asked.grace) == ("enough", 0.5)


def test_cancel_of_a_wrong_id_among_others_cancels_nothing(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    assert voidbus("cancel", "run-a", "absent").code == 4
    assert not any(isinstance(asked, CancelRun) for asked in supervisor.asked)


def test_a_cancel_that_does_not_end_the_run_times_out(
    supervisor: FakeSupervisor, voidbus: Voidbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "BEYOND_GRACE", 0.2)
    supervisor.add_run("run-a")
    supervisor.answers[CancelRun] = lambda delivery: delivery.reply(
        CancelAccepted(run_id="run-a", state=supervisor.runs["run-a"].status)
    )
    result = voidbus("cancel", "run-a", "--grace", 0)
    assert result.code == 124
    assert "has not within 0.2 s" in result.err
    assert voidbus("cancel", "run-a", "--no-wait").out == "run-a cancelling\n"


def test_inbox_put_sends_the_whole_inbox(
    supervisor: FakeSupervisor, voidbus: Voidbus, tmp_path: Path
) -> None:
    supervisor.add_run("run-a")
    file = tmp_path / "inbox.json"
    file.write_text(
        json.dumps({"execution_id": "e", "candidate_id": "c", "iteration": 1, "entries": []})
    )
    result = voidbus("inbox", "put", "run-a", file)
    assert (result.code, result.out) == (0, "inbox version 1; 0 intents wait\n")
    assert isinstance(supervisor.wait_for(PutInbox), PutInbox)
    file.write_text('{"execution_id": 1}')
    result = voidbus("inbox", "put", "run-a", file)
    assert result.code == 2
    assert "candidate_id" in result.err


def test_message_sends_a_summary_or_json(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a")
    arguments = ("message", "run-a", "--kind", "signal", "--from", "me")
    assert voidbus(*arguments, "--summary", "look here", "--json").code == 0
    asked = supervisor.wait_for(PushMessage)
    assert isinstance(asked, PushMessage)
    assert asked.entry.payload == {"summary_text": "look here"}
    assert asked.entry.from_candidate_id == "me"
    assert voidbus(*arguments).code == 2
    assert voidbus(*arguments, "--payload", "{").code == 2
    assert voidbus(*arguments, "--payload", "[1]").code == 0


def test_intents_are_listed_and_drained_only_when_asked(
    supervisor: FakeSupervisor, voidbus: Voidbus, intent: Intent
) -> None:
    supervisor.add_run("run-a", "succeeded")
    assert voidbus("intents", "run-a").err == "no intents\n"
    supervisor.intents["run-a"] = (intent,)
    document = json.loads(voidbus("intents", "run-a", "--drain", "--json").out)
    assert document["intents"][0]["payload"] == intent.payload
    assert [asked.drain for asked in supervisor.asked if isinstance(asked, ReadIntents)] == [
        False,
        True,
    ]


def test_stop_waits_until_the_process_is_gone_and_says_what_became_of_the_runs(
    state: Path, voidbus: Voidbus
) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
        FakeSupervisor(state, pid=process.pid) as supervisor,
    ):
        supervisor.add_run("run-a")
        supervisor.add_run("run-b")

        def end(delivery: Delivery) -> None:
            supervisor.emit("run-a", "run.finished")
            delivery.reply(Accepted(operation="stop"))

        supervisor.answers[StopSupervisor] = end

        def leave() -> None:
            supervisor.wait_for(StopSupervisor)
            process.communicate(b"\n")

        thread = threading.Thread(target=leave)
        thread.start()
        result = voidbus("stop", "--runs", "leave", "--deadline", 7)
        thread.join()
        assert result.code == 0
        lines = result.out.splitlines()
        assert lines[0].startswith(f"supervisor (process {process.pid}) stopped in ")
        assert sorted(lines[1:]) == [
            "run-a finished",
            "run-b goes on; the next supervisor adopts it",
        ]
        asked = supervisor.wait_for(StopSupervisor)
        assert isinstance(asked, StopSupervisor)
        assert (asked.runs, asked.deadline) == ("leave", 7.0)


def test_a_supervisor_that_does_not_stop_is_named_after_the_deadline(
    state: Path, voidbus: Voidbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voidbus.cli.stop._BEYOND", 0.1)
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
        FakeSupervisor(state, pid=process.pid),
    ):
        result = voidbus("stop", "--deadline", 0.1)
        process.communicate(b"\n")
    assert result.code == 124
    assert f"kill -KILL {process.pid}" in result.err
