"""Starting runs by HTTP, and specifications that are wrong (contract 1.5, 1.6, 2)."""

from __future__ import annotations

import json
import re
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from api_kit import (
    TIME,
    gate,
    step,
    workflow,
    write_spec,
)
from http_kit import HttpClient


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
        b'{"file": "x", "extra": NaN}',
        b'{"file": "x", "extra": -Infinity}',
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
    door: HttpClient, body: bytes
) -> None:
    answer = door.ask("POST", "/v1/runs", body, {"Content-Type": "application/json"})
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
    door: HttpClient, tmp_path: Path
) -> None:
    file = workflow(tmp_path, step("a", "true"))
    given = {"max_stage_retries": 0, "cancel_grace_period_secs": 0}
    run = door.finish(file, policy=given)
    assert run["policy"] == {
        "max_parallel_microvms_per_run": 4,
        "max_stage_retries": 0,
        "stage_timeout_secs": 3600,
        "cancel_grace_period_secs": 0,
    }


def test_a_run_without_a_policy_shows_none(ended: dict[str, Any]) -> None:
    assert ended["policy"] is None


def test_a_body_that_is_no_utf_8_is_read_with_replacements(
    door: HttpClient, tmp_path: Path
) -> None:
    file = str(workflow(tmp_path, step("a", "echo out"))).encode()
    answer = door.ask("POST", "/v1/runs", b'{"file": "%s", "input": "a\xffb"}' % file)
    run = door.wait_end(answer.json["run_id"])
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


def test_starts_of_one_id_at_the_same_time_are_one_run(door: HttpClient, tmp_path: Path) -> None:
    file = str(workflow(tmp_path, step("a", "echo once")))
    run_id = f"race-{uuid.uuid4().hex[:8]}"
    answers: list[tuple[int, Any]] = []

    def start() -> None:
        answer = door.post("/v1/runs", {"file": file, "run_id": run_id})
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
    run = door.wait_end(run_id)
    assert [e["event_type"] for e in run["events"]].count("run.started") == 1
    assert [e["event_type"] for e in run["events"]].count("stage.started") == 1


def test_starts_without_an_id_never_share_one(door: HttpClient, tmp_path: Path) -> None:
    file = str(workflow(tmp_path, step("a", "true")))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(door.start(file))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 6
    for run_id in found:
        assert door.wait_end(run_id)["status"] == "succeeded"


@pytest.mark.parametrize("run_id", ["", "../up", "a/b", "a b", ".", "..", "x" * 101, "a\0b", "ü"])
def test_an_id_that_could_be_a_path_is_refused(door: HttpClient, run_id: str) -> None:
    answer = door.post("/v1/runs", {"file": "/nowhere.yaml", "run_id": run_id})
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
    door: HttpClient, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    fields = {key: value for key, value in sections.items() if key != "kind"}
    run = door.finish(write_spec(tmp_path, sections["kind"], **fields))
    assert run["status"] == "failed"
    assert message in run["error"]
    (wrong,) = [e for e in run["events"] if e["event_type"] == "spec.parse_failed"]
    assert message in wrong["message"]
    assert "stage.queued" not in [event["event_type"] for event in run["events"]]


def test_yaml_is_told_from_json_by_the_name_and_keys_nobody_knows_are_ignored(
    door: HttpClient, tmp_path: Path
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
    assert door.finish(json_file)["status"] == "succeeded"
    assert door.finish(yaml_file)["status"] == "succeeded"


@pytest.mark.parametrize("asked", ["by the request", "by the specification"])
def test_a_snapshot_is_passed_over_with_a_warning(
    door: HttpClient, tmp_path: Path, asked: str
) -> None:
    sandbox = {"mode": "mock"}
    if asked == "by the specification":
        sandbox["snapshot"] = "abc"
    spec = workflow(tmp_path, step("a", "true"), sandbox=sandbox)
    more = {"snapshot": "abc"} if asked == "by the request" else {}
    run = door.finish(spec, **more)
    assert run["status"] == "succeeded"
    (warning,) = [e for e in run["events"] if "no snapshots" in e["message"]]
    assert warning["level"] == "warn"
    assert "boots cold" in warning["message"]
