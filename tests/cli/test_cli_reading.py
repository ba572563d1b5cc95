"""Commands that read: ps, inspect, events, logs, actors, telemetry."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fake_supervisor import FakeSupervisor

from voidbus.actors.messages.runs import ListRuns, ReadEvents, RunState, StageState
from voidbus.transport.fault import FaultReason

Voidbus = Callable[..., Any]


def test_ps_lists_active_runs_only(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-old", "succeeded")
    supervisor.add_run("run-live")
    result = voidbus("ps")
    assert result.code == 0
    assert "run-live" in result.out
    assert "run-old" not in result.out
    assert "run-old" in voidbus("ps", "--all").out


def test_ps_without_runs_says_where_ended_ones_are(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    result = voidbus("ps")
    assert result.code == 0
    assert "ps --all" in result.err


def test_ps_selects_one_state(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a", "failed", error="no machine")
    supervisor.add_run("run-b", "succeeded")
    result = voidbus("ps", "--state", "failed")
    assert "run-a" in result.out
    assert "no machine" in result.out
    assert "run-b" not in result.out
    asked = supervisor.wait_for(ListRuns)
    assert isinstance(asked, ListRuns)
    assert asked.state == "terminal"


def test_ps_json_has_the_fields_of_the_message(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    state = supervisor.add_run("run-a")
    document = json.loads(voidbus("ps", "--json").out)
    assert document == {"runs": [json.loads(state.to_json())], "total": 1}
    assert set(document["runs"][0]) == set(RunState.model_fields)


def test_output_that_is_no_terminal_has_no_escapes_whatever_a_run_is_called(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a", name="\x1b[31mred\x1b]0;title\x07", error="two\nlines\u202e")
    for arguments in (("ps",), ("inspect", "run-a")):
        result = voidbus(*arguments)
        assert result.code == 0
        assert not set(result.out) & {"\x1b", "\x07", "\u202e"}
        assert "\\x1b[31mred" in result.out


def test_inspect_shows_stages_cost_and_output(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run(
        "run-a",
        "succeeded",
        stage_states={
            "build": StageState(
                status="succeeded",
                started_at="2026-01-01T00:00:00Z",
                completed_at="2026-01-01T00:00:02.500000000Z",
            )
        },
        policy={"stage_timeout_secs": 60},
    )
    supervisor.report("run-a", "first\nsecond")
    out = voidbus("inspect", "run-a").out
    assert "120 tokens in, 45 tokens out, $0.0125" in out
    assert "stage_timeout_secs=60" in out
    assert "first\nsecond\n" in out
    assert "12s" in out
    assert any("build" in line and "2.5s" in line for line in out.splitlines())


def test_inspect_json_has_the_run_and_its_sidecar(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    document = json.loads(voidbus("inspect", "run-a", "--json").out)
    assert document["id"] == "run-a"
    assert document["sidecar"] is None  # its node is not connected


def test_a_run_is_found_by_a_unique_beginning_of_its_id(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("alpha-1")
    supervisor.add_run("beta-1")
    assert json.loads(voidbus("inspect", "al", "--json").out)["id"] == "alpha-1"


def test_an_exact_id_wins_over_longer_ones(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("a")
    supervisor.add_run("ab")
    assert json.loads(voidbus("inspect", "a", "--json").out)["id"] == "a"


def test_an_ambiguous_id_lists_the_candidates(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    for number in range(10):
        supervisor.add_run(f"run-{number}")
    result = voidbus("inspect", "run-")
    assert result.code == 2
    assert "run-9 (running)" in result.err
    assert "and 2 more" in result.err


def test_an_unknown_run_exits_with_4(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a")
    for arguments in (("inspect", "zzz"), ("events", "zzz"), ("cancel", "zzz"), ("logs", "zz/?")):
        result = voidbus(*arguments)
        assert result.code == 4, arguments
        assert result.err.startswith("voidbus: error: there is no run ")
        assert "voidbus ps --all" in result.err
        assert result.out == ""


def test_events_come_in_order_over_many_pages(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.page_limit = 7
    supervisor.add_run("run-a")
    for number in range(40):
        supervisor.emit("run-a", "box.started", f"number {number}", publish=False)
    lines = voidbus("events", "run-a").out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == [str(n) for n in range(40)]
    assert len(voidbus("events", "run-a", "--since", 37).out.splitlines()) == 2


def test_events_json_is_one_document(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.page_limit = 2
    supervisor.add_run("run-a")
    for kind in ("run.started", "log.chunk", "run.finished"):
        supervisor.emit("run-a", kind)
    document = json.loads(voidbus("events", "run-a", "--json").out)
    assert [event["event_type"] for event in document["events"]] == [
        "run.started",
        "log.chunk",
        "run.finished",
    ]
    assert document["last_seq"] == 2
    assert document["ended"] is True


def test_logs_are_the_lines_programs_printed(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.started")
    supervisor.emit("run-a", "log.chunk", stream="stdout", payload={"data": "one \x1b[2J"})
    supervisor.emit("run-a", "log.chunk", stream="stderr", payload={"data": "two"})
    supervisor.emit("run-a", "log.closed", stream="stdout")
    assert voidbus("logs", "run-a").out == "one \\x1b[2J\ntwo\n"
    assert voidbus("logs", "run-a", "--stream", "stderr").out == "two\n"
    document = json.loads(voidbus("logs", "run-a", "--json").out)
    assert document["events"][0]["payload"]["data"] == "one \x1b[2J"


def test_actors_are_shown_as_a_tree_with_their_last_faults(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    result = voidbus("actors")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[1].startswith("supervisor (process 1234, 5 threads)")
    assert lines[2].split()[:4] == ["├─", "journal", "running", "1m15s"]
    assert lines[2].rstrip().endswith("disk full")
    assert lines[5].startswith("   └─ one")
    assert "2/100" in lines[2]


def test_actors_shows_which_one_is_stuck_and_in_what(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    stuck = {"state": "stuck", "stuck_for": 12.4, "handler": "runs.count \x1b[2J"}
    supervisor.root_status = stuck
    result = voidbus("actors")
    assert result.code == 1
    assert "root     stuck for 12s in runs.count \\x1b[2J" in result.out
    document = json.loads(voidbus("actors", "--json").out)
    assert stuck.items() <= document["systems"][0]["actors"][1].items()


def test_actors_says_which_run_process_does_not_answer(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("a")
    result = voidbus("actors")
    assert result.code == 1
    assert "run-a: no answer: no node run-a is connected" in result.out
    document = json.loads(voidbus("actors", "--json").out)
    assert document["systems"][0]["node"] == "supervisor"
    assert list(document["unreachable"]) == ["run-a"]


def test_telemetry_is_a_table(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a")
    out = voidbus("telemetry", "run-a").out
    assert "12.5%" in out
    assert "5.0MiB" in out
    assert json.loads(voidbus("telemetry", "run-a", "--json").out)["next_seq"] == 1


def test_a_journal_that_fails_is_explained_without_a_traceback(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.answers[ListRuns] = lambda delivery: delivery.fail(
        FaultReason.FAILED, "the journal's disk is full; free some space"
    )
    result = voidbus("ps")
    assert result.code == 1
    assert result.err == "voidbus: error: the journal's disk is full; free some space\n"


def test_an_older_supervisor_is_named_as_what_it_is(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    supervisor.answers[ReadEvents] = lambda delivery: delivery.fail(
        FaultReason.UNHANDLED, "no message runs.read_events version 1"
    )
    result = voidbus("events", "run-a")
    assert result.code == 1
    assert "Use the same version" in result.err
