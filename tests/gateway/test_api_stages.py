"""Stages and telemetry (contract 1.10, 1.11)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, api_house, box, gate, pipeline, scripted, step, workflow, write_spec
from guest_vm import eventually
from http_kit import HttpClient

FIELDS = {
    "stage_name",
    "box_name",
    "group_id",
    "depends_on",
    "status",
    "stage_attempt",
    "started_at",
    "completed_at",
    "duration_ms",
    "exit_code",
}


def stages(api: HttpClient, run_id: str) -> list[dict[str, Any]]:
    answer = api.get(f"/v1/runs/{run_id}/stages")
    assert answer.status == 200
    assert set(answer.json) == {"run_id", "attempt_id", "updated_at", "stages"}
    assert (answer.json["run_id"], answer.json["attempt_id"]) == (run_id, 1)
    found: list[dict[str, Any]] = answer.json["stages"]
    assert all(set(stage) == FIELDS for stage in found)
    return found


def test_stages_are_shown_in_the_order_they_were_queued_with_what_became_of_them(
    api: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path,
        step("good", "true"),
        step("bad", "exit 7", "good"),
        step("after", "true", "bad"),
    )
    run = api.finish(spec)
    good, bad, after = stages(api, run["id"])
    assert [s["stage_name"] for s in (good, bad, after)] == ["good", "bad", "after"]
    assert [s["group_id"] for s in (good, bad, after)] == ["g0", "g1", "g2"]
    assert [s["depends_on"] for s in (good, bad, after)] == [[], ["good"], ["bad"]]
    assert [s["status"] for s in (good, bad, after)] == ["succeeded", "failed", "skipped"]
    assert (good["exit_code"], good["box_name"], good["stage_attempt"]) == (0, None, 1)
    assert bad["exit_code"] != 0
    for stage in (good, bad):
        assert stage["started_at"] <= stage["completed_at"]
        assert stage["duration_ms"] >= 0
    assert (after["started_at"], after["duration_ms"], after["exit_code"]) == (None, None, None)
    shown = api.get(f"/v1/runs/{run['id']}/stages").json
    assert shown["updated_at"] == run["updated_at"]


def test_stages_are_shown_while_the_run_goes_on(door: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    spec = workflow(
        tmp_path,
        step("done", "true"),
        step("busy", f"echo up; {opened.wait}", "done"),
        step("next", "true", "busy"),
    )
    run_id = door.start(spec)
    door.wait_log(run_id, "up")
    found = {stage["stage_name"]: stage for stage in stages(door, run_id)}
    assert {n: s["status"] for n, s in found.items()} == {
        "done": "succeeded",
        "busy": "running",
        "next": "queued",
    }
    assert found["busy"]["started_at"] is not None
    assert (found["busy"]["completed_at"], found["next"]["started_at"]) == (None, None)
    # One that only waits is not among a run's states.
    opened.open()
    door.wait_end(run_id)


def test_a_stage_that_is_tried_again_shows_the_attempt_and_only_its_outcome(
    door: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    script = f"echo x >> tries; test $(wc -l < tries) -ge 3 || exit 1; echo up; {opened.wait}"
    run_id = door.start(workflow(tmp_path, step("a", script)), policy={"max_stage_retries": 5})
    door.wait_log(run_id, "up")
    (running,) = stages(door, run_id)
    assert (running["status"], running["stage_attempt"]) == ("running", 3)
    assert (running["completed_at"], running["exit_code"]) == (None, None)
    opened.open()
    run = door.wait_end(run_id)
    assert run["status"] == "succeeded"
    (ended,) = stages(door, run_id)
    assert (ended["status"], ended["stage_attempt"], ended["exit_code"]) == ("succeeded", 3, 0)
    attempts = [
        (event["event_type"], event["payload"]["stage_attempt"])
        for event in run["events"]
        if event["event_type"] in ("stage.started", "stage.failed", "stage.completed")
    ]
    assert attempts == [
        ("stage.started", 1),
        ("stage.failed", 1),
        ("stage.started", 2),
        ("stage.failed", 2),
        ("stage.started", 3),
        ("stage.completed", 3),
    ]


def test_a_pipelines_stages_are_its_boxes(door: HttpClient, tmp_path: Path) -> None:
    found = stages(door, door.finish(pipeline(tmp_path, box("p"), box("q")))["id"])
    assert [(s["stage_name"], s["box_name"], s["depends_on"]) for s in found] == [
        ("p", "p", []),
        ("q", "q", ["p"]),
    ]


def test_a_sandbox_has_no_stages(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.start(write_spec(tmp_path, "sandbox"))
    door.wait_type(run_id, "sandbox.ready")
    assert stages(door, run_id) == []
    door.post(f"/v1/runs/{run_id}/cancel")


def test_stages_of_a_run_nobody_knows_are_not_found(api: HttpClient) -> None:
    for path in ("stages", "telemetry"):
        answer = api.get(f"/v1/runs/nobody/{path}")
        assert answer.problem == (404, "NOT_FOUND", False)
        assert answer.json["message"] == "run 'nobody' not found"


# -- telemetry -----------------------------------------------------------------------------------

RING = 60
# A guest's samples are handed in five at a time, one a second.
_SAMPLED = 30.0


@pytest.fixture(scope="module")
def sampled() -> Iterator[ApiHouse]:
    """A house where samples are taken often."""
    with api_house(VOIDBUS_TELEMETRY__INTERVAL_SECS="0.1") as built:
        yield built


@pytest.fixture(scope="module")
def measured(sampled: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = workflow(tmp_path_factory.mktemp("measured"), step("a", "sleep 1"))
    return str(sampled.unix.finish(spec)["id"])


def telemetry(house: ApiHouse, run_id: str, query: str = "") -> dict[str, Any]:
    answer = house.unix.get(f"/v1/runs/{run_id}/telemetry{query}")
    assert answer.status == 200
    assert set(answer.json) == {"run_id", "attempt_id", "next_seq", "samples"}
    assert (answer.json["run_id"], answer.json["attempt_id"]) == (run_id, 1)
    found: dict[str, Any] = answer.json
    return found


def test_samples_are_numbered_from_1_and_are_of_the_guest_or_the_host(
    sampled: ApiHouse, measured: str
) -> None:
    page = telemetry(sampled, measured)
    assert [s["seq"] for s in page["samples"]] == list(range(1, len(page["samples"]) + 1))
    assert page["next_seq"] == page["samples"][-1]["seq"]
    for sample in page["samples"]:
        assert {"seq", "timestamp_ms", "stage_name"} <= set(sample)
        assert sample["stage_name"] is None
        assert ("guest" in sample) != ("host" in sample) == ("timestamp" in sample)
        if "host" in sample:
            assert set(sample["host"]) == {
                "rss_bytes",
                "cpu_percent",
                "io_read_bytes",
                "io_write_bytes",
            }
            assert sample["host"]["rss_bytes"] > 0


def test_a_short_run_has_samples_of_its_guest_too(sampled: ApiHouse, tmp_path: Path) -> None:
    run_id = sampled.unix.finish(workflow(tmp_path, step("a", "sleep 2.5")))["id"]

    def found() -> bool:
        return any("guest" in sample for sample in telemetry(sampled, run_id)["samples"])

    assert eventually(found, _SAMPLED)


def test_samples_after_a_number_are_those_behind_it(sampled: ApiHouse, measured: str) -> None:
    everything = telemetry(sampled, measured)
    some = telemetry(sampled, measured, "?from_seq=2")
    assert some["samples"] == everything["samples"][2:]
    last = everything["next_seq"]
    nothing = telemetry(sampled, measured, f"?from_seq={last}")
    assert (nothing["samples"], nothing["next_seq"]) == ([], last)
    beyond = telemetry(sampled, measured, "?from_seq=100000")
    assert (beyond["samples"], beyond["next_seq"]) == ([], 100000)


def test_samples_may_be_of_one_stage(sampled: ApiHouse, measured: str) -> None:
    page = telemetry(sampled, measured, "?stage_name=nobody")
    assert page["samples"] == []


@pytest.fixture(scope="module")
def ringed() -> Iterator[ApiHouse]:
    """A house where no more samples of a run are kept than a test can wait for."""
    often = {
        "VOIDBUS_TELEMETRY__INTERVAL_SECS": "0.05",
        "VOIDBUS_TELEMETRY__BUFFER_SIZE": str(RING),
    }
    with api_house(**often) as built:
        yield built


@pytest.fixture(scope="module")
def watched(ringed: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An agent that goes on, of which there have been more samples than are kept."""
    spec = write_spec(
        tmp_path_factory.mktemp("watched"), "agent", name="scout", agent=scripted("sleep 600")
    )
    run_id = ringed.unix.start(spec)
    assert eventually(lambda: telemetry(ringed, run_id)["next_seq"] > RING, _SAMPLED)
    return run_id


def test_samples_of_a_guest_are_of_its_stage_and_those_of_the_host_of_none(
    ringed: ApiHouse, watched: str
) -> None:
    of_stage: list[dict[str, Any]] = []
    every: list[dict[str, Any]] = []

    def found() -> bool:
        every[:] = telemetry(ringed, watched)["samples"]
        of_stage[:] = telemetry(ringed, watched, "?stage_name=scout")["samples"]
        return bool(of_stage) and any("guest" in sample for sample in every)

    assert eventually(found, _SAMPLED)
    for sample in of_stage:
        assert set(sample) == {"seq", "timestamp_ms", "stage_name", "guest"}
        assert set(sample["guest"]) == {
            "cpu_percent",
            "memory_used_bytes",
            "memory_total_bytes",
            "net_rx_bytes",
            "net_tx_bytes",
            "procs_running",
            "open_fds",
        }
        assert 0 < sample["guest"]["memory_used_bytes"] < sample["guest"]["memory_total_bytes"]
        assert sample["guest"]["open_fds"] > 0
    assert {s["stage_name"] for s in every if "guest" in s} == {"scout"}
    assert {s["stage_name"] for s in every if "host" in s} == {None}


def test_the_newest_samples_are_kept_and_no_more_than_configured(
    ringed: ApiHouse, watched: str
) -> None:
    page = telemetry(ringed, watched)
    last = page["next_seq"]
    assert last > RING
    assert [s["seq"] for s in page["samples"]] == list(range(last - RING + 1, last + 1))
    # Who asks for what is forgotten gets what there is.
    assert telemetry(ringed, watched, "?from_seq=1")["samples"][0]["seq"] > last - RING


def test_a_client_that_passes_back_the_next_number_gets_each_sample_once(
    ringed: ApiHouse, watched: str
) -> None:
    first = after = telemetry(ringed, watched)["next_seq"]
    seqs: list[int] = []

    def five_more() -> bool:
        nonlocal after
        page = telemetry(ringed, watched, f"?from_seq={after}")
        seqs.extend(sample["seq"] for sample in page["samples"])
        after = page["next_seq"]
        return len(seqs) >= 5

    assert eventually(five_more, _SAMPLED)
    assert seqs == list(range(first + 1, after + 1))


@pytest.mark.parametrize("from_seq", ["x", "-1", "1.5", "", "1e3", "%D9%A3", "9" * 30])
def test_a_number_that_is_none_is_refused(sampled: ApiHouse, measured: str, from_seq: str) -> None:
    answer = sampled.unix.get(f"/v1/runs/{measured}/telemetry?from_seq={from_seq}")
    assert answer.problem == (400, "INVALID_PARAMS", False)


def test_telemetry_is_lost_with_the_supervisor_and_says_so_by_being_empty(
    sampled: ApiHouse, measured: str
) -> None:
    sampled.restart()
    page = telemetry(sampled, measured, "?from_seq=3")
    assert (page["samples"], page["next_seq"]) == ([], 3)
