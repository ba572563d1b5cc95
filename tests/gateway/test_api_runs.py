"""Runs by HTTP: starting, listing, inspecting (contract 1.3 to 1.7)."""

from __future__ import annotations

import json
import re
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, agent, box, gate, pipeline, step, structured, workflow, write_spec
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
# RFC 3339, UTC with Z; nine digits of a fraction where there is one.
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{9})?Z\Z")


@pytest.fixture(scope="module")
def ended(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A workflow that ended well: `make` then `show`, of which the second is its output."""
    spec = workflow(
        tmp_path_factory.mktemp("ended"),
        step("make", structured({"status": "ok"})),
        step("show", "cat; echo two", "make"),
        output_step="show",
    )
    return house.unix.finish(spec)


def test_health_says_ok_and_where_runs_are_kept(api: HttpClient) -> None:
    answer = api.get("/v1/health")
    assert (answer.status, answer.json) == (200, {"status": "ok", "persistence": "disk"})


# -- start ---------------------------------------------------------------------------------------


def test_a_started_run_is_answered_with_its_id_its_attempt_and_running(
    api: HttpClient, tmp_path: Path
) -> None:
    answer = api.post("/v1/runs", {"file": str(workflow(tmp_path, step("a", "true")))})
    assert answer.status == 200
    body = answer.json
    assert set(body) == {"run_id", "attempt_id", "state"}
    assert (body["attempt_id"], body["state"]) == (1, "running")
    assert re.fullmatch(r"run-\d{13}", body["run_id"])
    api.wait_end(body["run_id"])


def test_keys_of_a_start_that_nobody_knows_are_ignored(api: HttpClient, tmp_path: Path) -> None:
    file = str(workflow(tmp_path, step("a", "true")))
    nulls = {"input": None, "run_id": None, "policy": None, "snapshot": None}
    answer = api.post("/v1/runs", {"file": file, **nulls, "colour": "green"})
    assert answer.status == 200
    api.wait_end(answer.json["run_id"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"file"',
        b"{}",
        b'{"file": null}',
        b'{"file": 7}',
        b'{"file": "x", "input": 7}',
        b'{"file": "x", "run_id": 7}',
        b'{"file": "x", "policy": 7}',
        b'{"file": "x", "policy": []}',
        b'{"file": "x", "snapshot": {}}',
        b"[" * 100_000,
        b'{"file": "x", "policy": {"max_stage_retries": -1}}',
        b'{"file": "x", "policy": {"max_stage_retries": 1.5}}',
        b'{"file": "x", "policy": {"max_stage_retries": "2"}}',
        b'{"file": "x", "policy": {"max_stage_retries": true}}',
        b'{"file": "x", "policy": {"max_stage_retries": 4294967296}}',
        b'{"file": "x", "policy": {"stage_timeout_secs": null}}',
        b'{"file": "x", "policy": {"stage_timeout_secs": 18446744073709551616}}',
    ],
)
def test_a_start_that_is_not_what_it_should_be_is_an_invalid_spec(
    unix: HttpClient, body: bytes
) -> None:
    answer = unix.ask("POST", "/v1/runs", body, {"Content-Type": "application/json"})
    assert answer.problem == (400, "INVALID_SPEC", False)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"max_parallel_microvms_per_run": 0}, "max_parallel_microvms_per_run must be >= 1"),
        ({"stage_timeout_secs": 0}, "stage_timeout_secs must be > 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_in_the_words_clients_know(
    api: HttpClient, policy: dict[str, int], message: str
) -> None:
    answer = api.post("/v1/runs", {"file": "/nowhere.yaml", "policy": policy})
    assert answer.problem == (400, "INVALID_POLICY", False)
    assert answer.json["message"] == message


def test_a_policy_is_shown_with_the_defaults_of_what_it_leaves_out(
    unix: HttpClient, tmp_path: Path
) -> None:
    file = workflow(tmp_path, step("a", "true"))
    given = {"max_stage_retries": 0, "cancel_grace_period_secs": 0}
    run = unix.finish(file, policy=given)
    assert run["policy"] == {
        "max_parallel_microvms_per_run": 4,
        "max_stage_retries": 0,
        "stage_timeout_secs": 3600,
        "cancel_grace_period_secs": 0,
    }


def test_a_run_without_a_policy_shows_none(ended: dict[str, Any]) -> None:
    assert ended["policy"] is None


def test_a_body_that_is_no_utf_8_is_read_with_replacements(
    unix: HttpClient, tmp_path: Path
) -> None:
    file = str(workflow(tmp_path, step("a", "echo out"))).encode()
    answer = unix.ask("POST", "/v1/runs", b'{"file": "%s", "input": "a\xffb"}' % file)
    run = unix.wait_end(answer.json["run_id"])
    assert run["report"]["output"] == "a\ufffdb\nout\n"


def test_a_run_of_the_same_id_is_started_once(api: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    file = workflow(tmp_path, step("a", opened.wait))
    run_id = f"mine-{uuid.uuid4().hex[:8]}"
    first = api.post("/v1/runs", {"file": str(file), "run_id": run_id})
    second = api.post("/v1/runs", {"file": "/another.yaml", "input": "x", "run_id": run_id})
    expected = {"run_id": run_id, "attempt_id": 1, "state": "running"}
    assert (first.status, first.json) == (200, expected)
    assert (second.status, second.json) == (200, expected)
    opened.open()
    run = api.wait_end(run_id)
    assert (run["status"], run["file"]) == ("succeeded", str(file))
    third = api.post("/v1/runs", {"file": str(file), "run_id": run_id})
    assert third.problem == (409, "ALREADY_TERMINAL", False)
    assert api.run(run_id)["events"] == run["events"]


def test_starts_of_one_id_at_the_same_time_are_one_run(unix: HttpClient, tmp_path: Path) -> None:
    file = str(workflow(tmp_path, step("a", "echo once")))
    run_id = f"race-{uuid.uuid4().hex[:8]}"
    answers: list[tuple[int, Any]] = []

    def start() -> None:
        answer = unix.post("/v1/runs", {"file": file, "run_id": run_id})
        answers.append((answer.status, answer.json))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [body for status, body in answers if status == 200]
    assert started
    assert all(body["run_id"] == run_id for body in started)
    # One that came when the run had ended already is told that.
    assert all(body["code"] == "ALREADY_TERMINAL" for status, body in answers if status != 200)
    run = unix.wait_end(run_id)
    assert [e["event_type"] for e in run["events"]].count("run.started") == 1
    assert [e["event_type"] for e in run["events"]].count("stage.started") == 1


def test_starts_without_an_id_never_share_one(unix: HttpClient, tmp_path: Path) -> None:
    file = str(workflow(tmp_path, step("a", "true")))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(unix.start(file))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 6
    for run_id in found:
        assert unix.wait_end(run_id)["status"] == "succeeded"


@pytest.mark.parametrize("run_id", ["", "../up", "a/b", "a b", ".", "..", "x" * 101, "a\0b", "ü"])
def test_an_id_that_could_be_a_path_is_refused(unix: HttpClient, run_id: str) -> None:
    answer = unix.post("/v1/runs", {"file": "/nowhere.yaml", "run_id": run_id})
    assert answer.problem == (400, "INVALID_PARAMS", False)


# -- specifications that are wrong ---------------------------------------------------------------


def test_a_specification_that_is_missing_is_a_run_that_fails(
    api: HttpClient, tmp_path: Path
) -> None:
    file = tmp_path / "nothing.yaml"
    answer = api.post("/v1/runs", {"file": str(file)})
    assert (answer.status, answer.json["state"]) == (200, "running")
    run = api.wait_end(answer.json["run_id"])
    assert run["status"] == "failed"
    assert str(file) in run["error"]
    kinds = [event["event_type"] for event in run["events"]]
    assert kinds[:3] == ["run.started", "env.provisioned", "spec.parse_failed"]
    assert run["events"][2]["level"] == "warn"
    failed = next(event for event in run["events"] if event["event_type"] == "run.failed")
    assert failed["message"] == f"run failed: {run['error']}"
    assert failed["level"] == "error"
    assert run["terminal_event_id"] == failed["event_id"]
    assert TIME.match(run["finished_at"])
    assert run["artifact_publication"] == {"status": "not_started", "manifest": []}
    assert api.get(f"/v1/runs/{run['id']}/stages").json["stages"] == []


AGENT = {"prompt": "x"}
STEP = {"name": "a", "run": {"program": "true"}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kind": "agent"}, "kind=agent requires 'agent' section"),
        ({"kind": "pipeline"}, "kind=pipeline requires 'pipeline' section"),
        ({"kind": "workflow"}, "kind=workflow requires 'workflow' section"),
        ({"kind": "agent", "agent": {"prompt": " "}}, "agent.prompt cannot be empty"),
        (
            {"kind": "agent", "agent": {**AGENT, "mode": "service", "timeout_secs": 5}},
            "mutually exclusive",
        ),
        (
            {"kind": "agent", "agent": {**AGENT, "mode": "service"}},
            "agent: mode: service requires output_file",
        ),
        (
            {
                "kind": "agent",
                "agent": {**AGENT, "mode": "service", "output_file": "/o"},
                "llm": {"provider": "claude", "credential_proxy": True},
            },
            "mutually exclusive",
        ),
        (
            {"kind": "agent", "agent": {**AGENT, "mode": "interactive", "timeout_secs": 5}},
            "mutually exclusive",
        ),
        ({"kind": "pipeline", "pipeline": {"boxes": []}}, "pipeline.boxes cannot be empty"),
        ({"kind": "workflow", "workflow": {"steps": []}}, "workflow.steps cannot be empty"),
        (
            {
                "kind": "workflow",
                "workflow": {"steps": [{**STEP, "mode": "service", "timeout_secs": 1}]},
            },
            "step 'a': mode: service and timeout_secs are mutually exclusive",
        ),
        (
            {"kind": "sandbox", "workflow": {"steps": [STEP]}},
            "kind: sandbox does not accept a workflow block",
        ),
        (
            {"kind": "sandbox", "agent": AGENT},
            "kind: sandbox does not accept an agent block",
        ),
        ({"kind": "sandbox", "api_version": "v9"}, "unsupported api_version"),
        (
            {"kind": "agent", "agent": {**AGENT, "skills": ["nothing"]}},
            "expected '<type>:<value>'",
        ),
        ({"kind": "agent", "agent": {**AGENT, "skills": ["x:y"]}}, "unsupported skill type"),
        (
            {"kind": "workflow", "workflow": {"steps": [{**STEP, "depends_on": ["x"]}]}},
            "Step 'x' not found in workflow",
        ),
        (
            {"kind": "workflow", "workflow": {"steps": [{**STEP, "depends_on": ["a"]}]}},
            "Circular dependency detected at step 'a'",
        ),
        (
            {
                "kind": "pipeline",
                "pipeline": {
                    "boxes": [{"name": "a", "prompt": "x"}],
                    "stages": [{"type": "fan_out", "boxes": ["a"]}],
                },
            },
            "pipeline first stage cannot be fan_out",
        ),
        (
            {
                "kind": "pipeline",
                "pipeline": {
                    "boxes": [{"name": "a", "prompt": "x"}],
                    "stages": [{"type": "box", "name": "b"}],
                },
            },
            "unknown box 'b'",
        ),
    ],
)
def test_a_specification_that_breaks_a_rule_fails_in_the_words_clients_know(
    unix: HttpClient, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    fields = {key: value for key, value in sections.items() if key != "kind"}
    run = unix.finish(write_spec(tmp_path, sections["kind"], **fields))
    assert run["status"] == "failed"
    assert message in run["error"]
    (wrong,) = [e for e in run["events"] if e["event_type"] == "spec.parse_failed"]
    assert message in wrong["message"]
    assert "stage.queued" not in [event["event_type"] for event in run["events"]]


def test_yaml_is_told_from_json_by_the_name_and_keys_nobody_knows_are_ignored(
    unix: HttpClient, tmp_path: Path
) -> None:
    document = {
        "kind": "workflow",
        "name": "f",
        "colour": 1,
        "sandbox": {"mode": "MOCK", "colour": 1},
        "workflow": {"colour": 1, "steps": [{**STEP, "colour": 1}]},
    }
    json_file, yaml_file = tmp_path / "spec.txt", tmp_path / "spec.YML"
    json_file.write_text(json.dumps(document))
    yaml_file.write_text(
        "kind: workflow\nname: f\nsandbox: {mode: mock}\nworkflow:\n"
        "  steps:\n    - {name: a, run: {program: 'true'}}\n"
    )
    assert unix.finish(json_file)["status"] == "succeeded"
    assert unix.finish(yaml_file)["status"] == "succeeded"


# -- inspect and list ----------------------------------------------------------------------------


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
    unix: HttpClient, tmp_path: Path, ended: dict[str, Any]
) -> None:
    for stage in ("make", "show"):
        state = ended["stage_states"][stage]
        assert set(state) == {"status", "started_at", "completed_at"}
        assert state["status"] == "succeeded"
    broken = workflow(tmp_path, step("bad", "exit 3"), step("after", "true", "bad"))
    states = unix.finish(broken)["stage_states"]
    assert states["bad"]["status"] == "failed"
    assert states["after"]["status"] == "skipped"
    assert "started_at" not in states["after"]


def test_a_run_that_goes_on_shows_what_runs(unix: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    run_id = unix.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}")))
    unix.wait_log(run_id, "up")
    run = unix.run(run_id)
    assert (run["status"], run["active_stage_count"], run["active_microvm_count"]) == (
        "running",
        1,
        1,
    )
    nothing_yet = ("error", "report", "terminal_event_id", "finished_at", "exit_code")
    assert [run[field] for field in nothing_yet] == [None] * 5
    opened.open()
    assert unix.wait_end(run_id)["status"] == "succeeded"


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


# -- events --------------------------------------------------------------------------------------


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
    unix: HttpClient, tmp_path: Path
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
    run = unix.finish(file)
    kinds = [event["event_type"] for event in run["events"]]
    assert kinds[2] == "run.spec.loaded"
    mounted = [event for event in run["events"] if event["event_type"] == "skill.mounted"]
    assert [event["seq"] for event in mounted] == [3, 4, 5, 6]
    assert [event["skill_type"] for event in mounted] == ["agent", "oci", "mcp", "inline"]
    assert all(event["skill_id"] for event in mounted)


def test_a_pipeline_begins_with_its_boxes_each_before_its_skills(
    unix: HttpClient, tmp_path: Path
) -> None:
    boxes = [{**box("p"), "skills": ["agent:claude"]}, {**box("q"), "skills": ["cli:jq"]}]
    run = unix.finish(pipeline(tmp_path, *boxes))
    planned = [(event["event_type"], event["box_name"]) for event in run["events"][3:7]]
    assert planned == [
        ("box.started", "p"),
        ("skill.mounted", "p"),
        ("box.started", "q"),
        ("skill.mounted", "q"),
    ]


def test_stage_events_carry_what_clients_read_from_them(unix: HttpClient, tmp_path: Path) -> None:
    spec = workflow(
        tmp_path,
        step("good", "true"),
        step("bad", "echo why >&2; exit 3"),
        step("after", "true", "bad"),
        output_step="good",
    )
    events = unix.finish(spec)["events"]

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


def test_every_event_has_its_second_name(unix: HttpClient, tmp_path: Path) -> None:
    spec = workflow(tmp_path, step("bad", "echo x; exit 1"), step("after", "true", "bad"))
    runs = [unix.finish(spec), unix.finish(agent(tmp_path)), unix.finish(tmp_path / "none.yaml")]
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


def test_a_method_http_does_not_know_gets_an_error_like_any_other(unix: HttpClient) -> None:
    answer = unix.ask("BREW", "/v1/health")
    assert answer.problem == (400, "INVALID_PARAMS", False)
