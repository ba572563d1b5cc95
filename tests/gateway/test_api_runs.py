"""Health, routes, and runs as they are listed and inspected (contract 1.3, 1.4, 1.7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_kit import (
    TIME,
    gate,
    step,
    workflow,
)
from http_kit import HttpClient

RUN_FIELDS = {
    "id",
    "status",
    "file",
    "report",
    "error",
    "events",
    "attempt_id",
    "started_at",
    "updated_at",
    "terminal_reason",
    "exit_code",
    "active_stage_count",
    "active_microvm_count",
    "policy",
    "terminal_event_id",
    "finished_at",
    "stage_states",
    "artifact_publication",
    "output_ready",
}


def test_health_says_ok_and_where_runs_are_kept(api: HttpClient) -> None:
    answer = api.get("/v1/health")
    assert (answer.status, answer.json) == (200, {"status": "ok", "persistence": "disk"})


def test_a_run_has_every_field_and_nulls_where_there_is_nothing(
    api: HttpClient, ended: dict[str, Any]
) -> None:
    run = api.run(ended["id"])
    assert set(run) >= RUN_FIELDS
    assert "sidecar" not in run
    assert run["status"] == "succeeded"
    assert (run["error"], run["terminal_reason"], run["policy"]) == (None, None, None)
    assert (run["active_stage_count"], run["active_microvm_count"]) == (0, 0)
    assert (run["attempt_id"], run["exit_code"], run["output_ready"]) == (1, 0, False)
    assert run["report"] == {
        "name": "flow",
        "kind": "workflow",
        "success": True,
        "output": "done\ntwo\n",
        "stages": 2,
        "total_cost_usd": 0.0,
        "input_tokens": 0,
        "output_tokens": 0,
    }
    for field in ("started_at", "updated_at", "finished_at"):
        assert TIME.match(run[field]), field
    assert run["started_at"] <= run["finished_at"] <= run["updated_at"]
    finished = next(e for e in run["events"] if e["event_type"] == "run.finished")
    assert run["terminal_event_id"] == finished["event_id"]


def test_stage_states_leave_out_the_times_that_are_not_there(
    door: HttpClient, tmp_path: Path, ended: dict[str, Any]
) -> None:
    for stage in ("make", "show"):
        state = ended["stage_states"][stage]
        assert set(state) == {"status", "started_at", "completed_at"}
        assert state["status"] == "succeeded"
    broken = workflow(tmp_path, step("bad", "exit 3"), step("after", "true", "bad"))
    states = door.finish(broken)["stage_states"]
    assert states["bad"]["status"] == "failed"
    assert states["after"]["status"] == "skipped"
    assert "started_at" not in states["after"]


def test_a_run_that_goes_on_shows_what_runs(door: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    run_id = door.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}")))
    door.wait_log(run_id, "up")
    run = door.run(run_id)
    assert (run["status"], run["active_stage_count"], run["active_microvm_count"]) == (
        "running",
        1,
        1,
    )
    nothing_yet = ("error", "report", "terminal_event_id", "finished_at", "exit_code")
    assert [run[field] for field in nothing_yet] == [None] * 5
    opened.open()
    assert door.wait_end(run_id)["status"] == "succeeded"


def test_a_run_nobody_knows_is_not_found(api: HttpClient) -> None:
    answer = api.get("/v1/runs/nobody")
    assert answer.problem == (404, "NOT_FOUND", False)
    assert answer.json["message"] == "run 'nobody' not found"


@pytest.mark.parametrize("path", ["cancel", "inbox", "messages", "a/b/c", "stages/x", "events/x"])
def test_what_else_is_got_below_runs_is_taken_for_a_runs_id(api: HttpClient, path: str) -> None:
    answer = api.get(f"/v1/runs/x/{path}")
    assert answer.problem == (404, "NOT_FOUND", False)
    assert answer.json["message"] == f"run 'x/{path}' not found"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1"),
        ("GET", "/v2/health"),
        ("GET", "/v1/health/"),
        ("POST", "/v1/health"),
        ("DELETE", "/v1/runs"),
        ("POST", "/v1/runs/x"),
        ("PUT", "/v1/runs/x/cancel"),
        ("POST", "/v1/runs/x/stages"),
        ("POST", "/v1/runs/x/inbox"),
        ("POST", "/v1/runs/x/intents"),
        ("PUT", "/v1/runs/x/messages"),
        ("DELETE", "/v1/sessions/x/messages"),
        ("GET", "/v1/sessions/x"),
        ("OPTIONS", "/v1/runs"),
        ("TRACE", "/v1/health"),
        ("PROPFIND", "/v1/runs"),
    ],
)
def test_a_route_that_is_not_there_is_not_found_whatever_the_method(
    api: HttpClient, method: str, path: str
) -> None:
    answer = api.ask(method, path)
    assert answer.problem == (404, "NOT_FOUND", False)
    assert answer.json["message"] == "route not found"


def test_runs_are_listed_whole_and_by_state(
    api: HttpClient, tmp_path: Path, ended: dict[str, Any]
) -> None:
    opened = gate(tmp_path)
    active_id = api.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}")))
    api.wait_log(active_id, "up")

    def listed(query: str) -> dict[str, dict[str, Any]]:
        body = api.get(f"/v1/runs{query}").json
        assert set(body) == {"runs"}
        return {run["id"]: run for run in body["runs"]}

    everything, active, terminal = listed(""), listed("?state=active"), listed("?state=terminal")
    assert {ended["id"], active_id} <= set(everything)
    assert active_id in active
    assert ended["id"] not in active
    assert ended["id"] in terminal
    assert active_id not in terminal
    assert set(active) | set(terminal) == set(everything)
    for query in ("?state=other", "?state=", "?state=ACTIVE", "?x=active"):
        assert set(listed(query)) == set(everything)
    # Of a parameter given twice the first stands.
    assert set(listed("?state=active&state=terminal")) == set(active)
    assert everything[ended["id"]] == api.run(ended["id"])
    assert all("sidecar" not in run for run in everything.values())
    # The second names of events are for one run's events, not for the list.
    kinds = [e["event_type"] for e in listed("?api_version=v2")[ended["id"]]["events"]]
    assert "run.started" in kinds
    opened.open()
    api.wait_end(active_id)


def test_a_method_http_does_not_know_gets_an_error_like_any_other(door: HttpClient) -> None:
    answer = door.ask("BREW", "/v1/health")
    assert answer.problem == (400, "INVALID_PARAMS", False)
