"""What the API says of itself: /metrics and /openapi.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from api_kit import ApiHouse, agent, step, structured, workflow
from http_kit import HttpClient
from prometheus_client.parser import text_string_to_metric_families

from voidbus.gateway.routes import ROUTES


def figures(api: HttpClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = api.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    names: list[str] = []
    for family in text_string_to_metric_families(answer.text):
        names.append(family.name)
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    assert len(names) == len(set(names))
    return found


def test_metrics_are_what_prometheus_reads(api: HttpClient) -> None:
    found = figures(api)
    names = {name for name, _ in found}
    for name in (
        "voidbus_info",
        "voidbus_http_requests_total",
        "voidbus_http_request_seconds_bucket",
        "voidbus_http_followers",
        "voidbus_process_resident_bytes",
        "voidbus_process_cpu_seconds_total",
        "voidbus_machines_active",
        "voidbus_mailbox_waiting",
    ):
        assert name in names


def test_metrics_count_runs_machines_and_followers_as_they_are(
    door: HttpClient, tmp_path: Path
) -> None:
    before = figures(door)
    run_id = door.start(workflow(tmp_path, step("a", "echo up; sleep 600")))
    with door.stream(run_id) as stream:
        for frame in stream:
            if frame.event["event_type"] == "log.chunk":
                break
        during = figures(door)
    door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0})
    after = figures(door)

    def rise(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return during[key] - before.get(key, 0.0)

    assert rise("voidbus_runs", status="running") == 1
    assert rise("voidbus_machines_active") == 1
    assert rise("voidbus_stages_active") == 1
    assert rise("voidbus_http_followers") == 1
    key = ("voidbus_runs", (("status", "cancelled"),))
    assert after[key] - before.get(key, 0.0) == 1
    assert after["voidbus_machines_active", ()] == before["voidbus_machines_active", ()]


def test_requests_are_counted_by_route_and_not_by_what_clients_make_up(
    door: HttpClient,
) -> None:
    for number in range(20):
        door.get(f"/v1/runs/made-up-{number}")
        door.get(f"/made-up-{number}")
    routes = {
        dict(labels)["route"]
        for name, labels in figures(door)
        if name == "voidbus_http_requests_total"
    }
    assert routes <= {route.path for route in ROUTES} | {"none"}


# -- the document --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(house: ApiHouse) -> dict[str, Any]:
    found: dict[str, Any] = house.unix.get("/openapi.json").json
    return found


def test_the_document_and_the_routes_are_the_same(document: dict[str, Any]) -> None:
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    served = {
        ("GET" if route.method == "*" else route.method, route.template)
        for route in ROUTES
        if route.tag != "fallback"
    }
    assert described == served
    assert document["openapi"].startswith("3.1")


def test_every_operation_is_described_once_and_whole(document: dict[str, Any]) -> None:
    operations = [
        (path, operation) for path, each in document["paths"].items() for operation in each.values()
    ]
    ids = [operation["operationId"] for _, operation in operations]
    assert len(ids) == len(set(ids))
    for path, operation in operations:
        named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
        assert named == re.findall(r"\{([a-z_]+)\}", path)
        assert operation["summary"]
        assert {"200", "401", "500"} <= set(operation["responses"])


def test_the_document_refers_to_nothing_that_is_not_in_it(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for each in value.values() for found in references(each)]
        if isinstance(value, list):
            return [found for each in value for found in references(each)]
        return []

    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas


def conforms(document: dict[str, Any], path: str, method: str, status: int, body: object) -> None:
    response = document["paths"][path][method]["responses"][str(status)]
    schema = response["content"]["application/json"]["schema"]
    whole = {**schema, "components": document["components"]}
    jsonschema_rs.validator_for(whole).validate(body)


def test_answers_are_as_the_document_says(
    api: HttpClient, document: dict[str, Any], tmp_path: Path
) -> None:
    result = {"status": "ok", "artifacts": [{"name": "note"}, {"name": "gone"}]}
    good = api.finish(
        workflow(
            tmp_path,
            step("a", structured(result, ("note", "x"))),
            step("b", "false", "a"),
            step("c", "true", "b"),
            output_step="a",
        ),
        policy={},
    )["id"]
    bad = api.finish(tmp_path / "nothing.yaml")["id"]
    busy = api.start(agent(tmp_path, CLAUDIO_HANG="1"))
    api.wait_type(busy, "stage.started")
    run = "/v1/runs/{run_id}"
    asked: list[tuple[str, str, str, int]] = [
        ("get", "/v1/health", "/v1/health", 200),
        ("get", "/v1/runs", "/v1/runs", 200),
        ("get", f"{run}/intents", f"/v1/runs/{busy}/intents", 200),
        ("get", run, "/v1/runs/nobody", 404),
        ("get", f"{run}/telemetry", f"/v1/runs/{good}/telemetry?from_seq=x", 400),
        ("get", f"{run}/stages/{{stage}}/output-file", f"/v1/runs/{bad}/stages/a/output-file", 404),
        ("post", f"{run}/cancel", f"/v1/runs/{good}/cancel", 200),
        ("post", "/v1/runs", "/v1/runs", 400),
        ("get", "/v1/sessions/{session_id}/messages", "/v1/sessions/s/messages", 200),
    ]
    for run_id in (good, bad, busy):
        asked += [
            ("get", run, f"/v1/runs/{run_id}", 200),
            ("get", f"{run}/events", f"/v1/runs/{run_id}/events", 200),
            ("get", f"{run}/stages", f"/v1/runs/{run_id}/stages", 200),
            ("get", f"{run}/telemetry", f"/v1/runs/{run_id}/telemetry", 200),
        ]
    for method, template, path, status in asked:
        answer = api.ask(method.upper(), path)
        assert answer.status == status, (path, answer)
        conforms(document, template, method, status, answer.json)
    ended = api.post(f"/v1/runs/{busy}/cancel", {"grace_secs": 0})
    conforms(document, f"{run}/cancel", "post", 200, ended.json)
