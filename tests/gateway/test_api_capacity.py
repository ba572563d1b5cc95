"""Starting runs where as many go on as may, or none may be started any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_kit import ApiHouse, api_house, gate, step, workflow, write_spec
from http_kit import Answer, HttpClient

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.supervisor import StopSupervisor

FULL = (429, "RESOURCE_LIMIT_EXCEEDED", True)


@pytest.fixture(scope="module")
def house() -> Iterator[ApiHouse]:
    with api_house(VOIDBUS_MAX_PARALLEL_RUNS="2") as built:
        yield built
        assert "Traceback" not in built.supervisor.log


@pytest.fixture
def going(unix: HttpClient, tmp_path: Path) -> Iterator[list[str]]:
    """As many runs as may go on; they are gone afterwards."""
    runs = [
        unix.start(write_spec(tmp_path, "sandbox"), run_id=f"{tmp_path.name}-{n}") for n in "ab"
    ]
    for run_id in runs:
        unix.wait_type(run_id, "sandbox.ready")
    yield runs
    for run_id in runs:
        assert unix.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0}).status == 200


def start(api: HttpClient, file: Path, **fields: object) -> Answer:
    return api.post("/v1/runs", {"file": str(file), **fields})


def test_one_run_more_than_may_go_on_is_refused_for_now(
    api: HttpClient, going: list[str], tmp_path: Path
) -> None:
    spec = workflow(tmp_path, step("a", "true"))
    for fields in ({}, {"run_id": f"{tmp_path.name}-more"}):
        answer = start(api, spec, **fields)
        assert answer.problem == FULL
        assert "max_parallel_runs" in answer.json["message"]
    assert api.get(f"/v1/runs/{tmp_path.name}-more").status == 404
    assert api.post(f"/v1/runs/{going[0]}/cancel", {"grace_secs": 0}).status == 200
    assert api.finish(spec)["status"] == "succeeded"


def test_a_start_of_a_run_that_goes_on_is_that_run_however_many_there_are(
    api: HttpClient, going: list[str], tmp_path: Path
) -> None:
    for run_id in going:
        answer = start(api, tmp_path / "another.yaml", run_id=run_id)
        expected = {"run_id": run_id, "attempt_id": 1, "state": "running"}
        assert (answer.status, answer.json) == (200, expected)


def test_a_start_of_a_run_that_has_ended_says_so_however_many_there_are(
    api: HttpClient, door: HttpClient, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    over = door.finish(workflow(tmp_path, step("a", "true")))["id"]
    request.getfixturevalue("going")
    assert start(api, tmp_path / "any.yaml", run_id=over).problem == (
        409,
        "ALREADY_TERMINAL",
        False,
    )


def test_a_run_that_has_ended_makes_room_at_once(door: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    other = door.start(workflow(tmp_path, step("a", opened.wait)))
    spec = workflow(tmp_path, step("a", "true"))
    for _ in range(20):
        assert door.finish(spec)["status"] == "succeeded"
    opened.open()
    assert door.wait_end(other)["status"] == "succeeded"


def test_while_the_supervisor_stops_a_run_that_goes_on_can_be_started_again_and_no_other(
    tmp_path: Path,
) -> None:
    opened = gate(tmp_path)
    with api_house() as house:
        over = house.unix.finish(workflow(tmp_path, step("a", "true")))["id"]
        spec = workflow(tmp_path, step("a", opened.wait))
        run_id = house.unix.start(spec)
        with house.supervisor.connect() as client:
            stopping = client.ask("root", StopSupervisor(runs="finish", deadline=60.0))
        assert isinstance(stopping, Accepted)
        assert start(house.unix, spec).problem == (503, "INTERNAL_ERROR", True)
        assert start(house.unix, spec, run_id="new").problem == (503, "INTERNAL_ERROR", True)
        again = start(house.unix, spec, run_id=run_id)
        assert (again.status, again.json["state"]) == (200, "running")
        assert start(house.unix, spec, run_id=over).problem[0] == 409
        opened.open()
        assert house.supervisor.process is not None
        house.supervisor.process.wait(40)
