"""The events of a run by HTTP (contract 1.7)."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from api_kit import (
    TIME,
    agent,
    box,
    pipeline,
    step,
    workflow,
    write_spec,
)
from http_kit import HttpClient

EVENT_FIELDS = {
    "ts_ms",
    "level",
    "event_type",
    "message",
    "run_id",
    "box_name",
    "skill_id",
    "skill_type",
    "environment_id",
    "mode",
    "stream",
    "seq",
    "payload",
    "stage_name",
    "group_id",
    "event_id",
    "attempt_id",
    "timestamp",
    "event_type_v2",
}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_events_are_a_bare_array_for_any_method(
    api: HttpClient, ended: dict[str, Any], method: str
) -> None:
    answer = api.ask(method, f"/v1/runs/{ended['id']}/events")
    assert answer.status == 200
    assert answer.json == ended["events"]


def test_events_have_every_field_and_are_numbered_from_0_without_a_gap(
    ended: dict[str, Any],
) -> None:
    events = ended["events"]
    assert [event["seq"] for event in events] == list(range(len(events)))
    for event in events:
        assert set(event) == EVENT_FIELDS
        assert event["level"] in ("info", "warn", "error")
        assert (event["run_id"], event["mode"]) == (ended["id"], "mock")
        assert event["environment_id"] == f"env-{ended['id']}"
        assert event["attempt_id"] == 1
        assert uuid.UUID(event["event_id"]).version == 7
        assert TIME.match(event["timestamp"])
    assert len({event["event_id"] for event in events}) == len(events)
    assert [event["ts_ms"] for event in events] == sorted(event["ts_ms"] for event in events)


def test_a_workflow_begins_with_these_events(ended: dict[str, Any]) -> None:
    first = ended["events"][:4]
    assert [event["event_type"] for event in first] == [
        "run.started",
        "env.provisioned",
        "run.spec.loaded",
        "workflow.planned",
    ]
    assert first[0]["message"] == f"run created for {ended['file']}"


def test_an_agent_begins_with_its_skills_and_without_those_that_are_added(
    door: HttpClient, tmp_path: Path
) -> None:
    skills = [
        "agent:claude-code",
        {"image": "img", "mount": "/skills/img"},
        {"command": "mcp", "args": []},
        {"name": "note", "content": "text"},
    ]
    file = write_spec(
        tmp_path,
        "agent",
        llm={"provider": "claude"},
        agent={"prompt": "x", "skills": skills, "messaging": {"enabled": True}},
    )
    run = door.finish(file)
    kinds = [event["event_type"] for event in run["events"]]
    assert kinds[2] == "run.spec.loaded"
    mounted = [event for event in run["events"] if event["event_type"] == "skill.mounted"]
    assert [event["seq"] for event in mounted] == [3, 4, 5, 6]
    assert [event["skill_type"] for event in mounted] == ["agent", "oci", "mcp", "inline"]
    assert all(event["skill_id"] for event in mounted)


def test_a_pipeline_begins_with_its_boxes_each_before_its_skills(
    door: HttpClient, tmp_path: Path
) -> None:
    boxes = [{**box("p"), "skills": ["agent:claude"]}, {**box("q"), "skills": ["cli:jq"]}]
    run = door.finish(pipeline(tmp_path, *boxes))
    planned = [(event["event_type"], event["box_name"]) for event in run["events"][3:7]]
    assert planned == [
        ("box.started", "p"),
        ("skill.mounted", "p"),
        ("box.started", "q"),
        ("skill.mounted", "q"),
    ]


def test_stage_events_carry_what_clients_read_from_them(door: HttpClient, tmp_path: Path) -> None:
    spec = workflow(
        tmp_path,
        step("good", "true"),
        step("bad", "echo why >&2; exit 3"),
        step("after", "true", "bad"),
        output_step="good",
    )
    events = door.finish(spec)["events"]

    def of(stage: str, kind: str) -> dict[str, Any]:
        (found,) = [
            e for e in events if e["stage_name"] == stage and e["event_type"] == f"stage.{kind}"
        ]
        return dict(found)

    assert of("after", "queued")["payload"] == {"depends_on": ["bad"]}
    assert of("good", "started")["payload"] == {"stage_attempt": 1}
    completed = of("good", "completed")
    assert set(completed["payload"]) == {"duration_ms", "exit_code", "stage_attempt"}
    assert (completed["payload"]["exit_code"], completed["level"]) == (0, "info")
    failed = of("bad", "failed")
    assert set(failed["payload"]) == {"duration_ms", "exit_code", "error", "stage_attempt"}
    assert failed["level"] == "error"
    assert failed["payload"]["exit_code"] != 0
    assert "Command failed with exit code 3: why" in failed["payload"]["error"]
    skipped = of("after", "skipped")
    assert skipped["payload"] == {"reason": 'dependency "bad" failed', "stage_attempt": 1}
    assert skipped["level"] == "warn"
    assert (of("good", "queued")["group_id"], skipped["group_id"]) == ("g0", "g1")
    assert all(event["box_name"] is None for event in events)


def test_what_programs_print_is_in_the_events_line_by_line_until_it_is_closed(
    ended: dict[str, Any],
) -> None:
    chunks = [event for event in ended["events"] if event["event_type"] == "log.chunk"]
    assert all(event["stream"] == "stdout" for event in chunks)
    of_show = [e["payload"]["data"] for e in chunks if e["stage_name"] == "show"]
    assert of_show == ["done", "two"]
    (closed,) = [event for event in ended["events"] if event["event_type"] == "log.closed"]
    assert closed["message"] == "stdout stream closed"
    assert closed["seq"] > chunks[-1]["seq"]
    (finished,) = [event for event in ended["events"] if event["event_type"] == "run.finished"]
    assert (finished["message"], finished["level"]) == ("run completed", "info")


V2_NAMES = {
    "run.started": "RunStarted",
    "run.finished": "RunCompleted",
    "run.failed": "RunFailed",
    "run.cancelled": "RunCancelled",
    "run.spec.loaded": "SpecLoaded",
    "env.provisioned": "EnvironmentProvisioned",
    "box.started": "BoxStarted",
    "skill.mounted": "SkillMounted",
    "workflow.planned": "WorkflowPlanned",
    "log.chunk": "LogChunk",
    "log.closed": "LogClosed",
    "spec.parse_failed": "SpecParseFailed",
    "stage.queued": "StageQueued",
    "stage.started": "StageStarted",
    "stage.failed": "StageFailed",
    "stage.skipped": "StageSkipped",
    "stage.completed": "StageSucceeded",
}


def second_name(first: str) -> str:
    """What is not in the table: split on `.` and `_`, capitalised, joined."""
    parts = re.split(r"[._]", first)
    return V2_NAMES.get(first) or "".join(part.capitalize() for part in parts)


def test_every_event_has_its_second_name(door: HttpClient, tmp_path: Path) -> None:
    spec = workflow(tmp_path, step("bad", "echo x; exit 1"), step("after", "true", "bad"))
    runs = [door.finish(spec), door.finish(agent(tmp_path)), door.finish(tmp_path / "none.yaml")]
    for run in runs:
        for event in run["events"]:
            assert event["event_type_v2"] == second_name(event["event_type"])


@pytest.mark.parametrize("where", ["", "/events"])
def test_api_version_v2_gives_events_their_second_name_alone(
    api: HttpClient, ended: dict[str, Any], where: str
) -> None:
    body = api.get(f"/v1/runs/{ended['id']}{where}?api_version=v2").json
    events = body if where else body["events"]
    expected = [{**e, "event_type": e["event_type_v2"]} for e in ended["events"]]
    assert events == expected
    other = api.get(f"/v1/runs/{ended['id']}{where}?api_version=v3").json
    assert (other if where else other["events"]) == ended["events"]


def test_events_after_a_marker_are_those_behind_it_and_all_for_one_nobody_knows(
    api: HttpClient, ended: dict[str, Any]
) -> None:
    events = ended["events"]
    path = f"/v1/runs/{ended['id']}/events?from_event_id="
    for at in (0, 4, len(events) - 1):
        assert api.get(path + events[at]["event_id"]).json == events[at + 1 :]
    for unknown in ("", "nobody", "01a21455-f728-7345-a610-d5618ec92b18"):
        assert api.get(path + unknown).json == events
    both = api.get(path + events[3]["event_id"] + "&api_version=v2").json
    assert both[0]["event_type"] == events[4]["event_type_v2"]


def test_events_of_a_run_nobody_knows_are_not_found(api: HttpClient) -> None:
    assert api.get("/v1/runs/nobody/events").problem == (404, "NOT_FOUND", False)
