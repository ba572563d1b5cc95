"""Cancelling a run by HTTP (contract 1.8)."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, agent, box, gate, pipeline, step, workflow, write_spec
from http_kit import HttpClient
from supervisor_kit import processes_of


def hung(folder: Path) -> Path:
    """Of two steps at once one is done and one hangs; two more wait for them."""
    return workflow(
        folder,
        step("done", "true"),
        step("hung", "echo up; exec sleep 600", "done"),
        step("next", "true", "hung"),
        step("last", "true", "next"),
    )


def cancelled(api: HttpClient, run_id: str, body: object = None) -> dict[str, Any]:
    answer = api.post(f"/v1/runs/{run_id}/cancel", body)
    assert answer.status == 200
    assert set(answer.json) == {"run_id", "state", "terminal_event_id"}
    assert answer.json["run_id"] == run_id
    found: dict[str, Any] = answer.json
    return found


def test_a_cancel_is_answered_when_the_run_has_ended(
    api: HttpClient, house: ApiHouse, tmp_path: Path
) -> None:
    run_id = api.start(hung(tmp_path))
    api.wait_log(run_id, "up")
    answer = cancelled(api, run_id, {"reason": "enough"})
    run = api.run(run_id)
    assert answer["state"] == run["status"] == "cancelled"
    last = next(e for e in run["events"] if e["event_type"] == "run.cancelled")
    assert answer["terminal_event_id"] == run["terminal_event_id"] == last["event_id"]
    assert last["level"] == "warn"
    assert run["terminal_reason"] == "enough"
    assert run["finished_at"] is not None
    assert run["artifact_publication"] == {"status": "not_started", "manifest": []}
    assert (run["active_stage_count"], run["active_microvm_count"]) == (0, 0)


# As many events as are sent at once, and one to either side.
@pytest.mark.parametrize("count", [499, 500, 501])
def test_a_run_knows_its_terminal_event_however_many_stages_end_with_it(
    door: HttpClient, tmp_path: Path, count: int
) -> None:
    waiting = [step(f"s{number}", "true", "hung") for number in range(count - 1)]
    run_id = door.start(workflow(tmp_path, step("hung", "echo up; exec sleep 600"), *waiting))
    door.wait_log(run_id, "up")
    answer = cancelled(door, run_id)
    run = door.run(run_id)
    last = run["events"][-1]
    assert last["event_type"] == "run.cancelled"
    assert (answer["state"], answer["terminal_event_id"]) == ("cancelled", last["event_id"])
    assert (run["terminal_event_id"], run["finished_at"]) == (last["event_id"], last["timestamp"])
    assert len(run["stage_states"]) == count


@pytest.mark.parametrize("size", [4000, 4001, 1024 * 1024, 4 * 1024 * 1024 - 20])
def test_of_a_long_reason_the_beginning_is_kept(
    door: HttpClient, tmp_path: Path, size: int
) -> None:
    run_id = door.start(hung(tmp_path))
    door.wait_log(run_id, "up")
    answer = cancelled(door, run_id, {"reason": "é" + "y" * (size - 1)})
    run = door.run(run_id)
    last = run["events"][-1]
    assert (answer["state"], answer["terminal_event_id"]) == ("cancelled", last["event_id"])
    assert run["terminal_reason"] == "é" + "y" * 3999
    assert last["message"] == f"run cancelled: {run['terminal_reason']}"


def test_a_cancel_ends_the_stages_that_run_and_those_that_wait(
    door: HttpClient, tmp_path: Path
) -> None:
    run_id = door.start(hung(tmp_path))
    door.wait_log(run_id, "up")
    cancelled(door, run_id)
    run = door.run(run_id)
    assert run["terminal_reason"] == "run marked cancelled"
    states = {name: stage["status"] for name, stage in run["stage_states"].items()}
    assert states == {"done": "succeeded", "hung": "failed", "next": "skipped", "last": "skipped"}
    kinds = [e["event_type"] for e in run["events"]]
    assert kinds.index("run.cancelled") > max(
        at for at, kind in enumerate(kinds) if kind.startswith("stage.")
    )
    ends = [
        event for event in run["events"] if event["event_type"] in ("stage.failed", "stage.skipped")
    ]
    assert [event["stage_name"] for event in ends] == ["hung", "next", "last"]
    failed, *skipped = (event["payload"] for event in ends)
    assert (failed["exit_code"], failed["error"]) == (-1, "run cancelled")
    assert failed["duration_ms"] >= 0
    assert [each["reason"] for each in skipped] == ["run cancelled"] * 2
    stages = {s["stage_name"]: s for s in door.get(f"/v1/runs/{run_id}/stages").json["stages"]}
    assert (stages["hung"]["status"], stages["hung"]["exit_code"]) == ("failed", -1)
    assert stages["last"]["status"] == "skipped"


def test_a_cancel_of_a_run_that_has_ended_changes_nothing(api: HttpClient, tmp_path: Path) -> None:
    good = api.finish(workflow(tmp_path, step("a", "true")))
    bad = api.finish(workflow(tmp_path, step("a", "false")))
    over = api.start(hung(tmp_path))
    api.wait_log(over, "up")
    cancelled(api, over, {"reason": "first"})
    for run in (good, bad, api.run(over)):
        for body in (None, {"reason": "again"}):
            assert cancelled(api, run["id"], body) == {
                "run_id": run["id"],
                "state": run["status"],
                "terminal_event_id": run["terminal_event_id"],
            }
        assert api.run(run["id"]) == run


def test_cancels_at_the_same_time_all_get_the_same_answer(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.start(hung(tmp_path))
    door.wait_log(run_id, "up")
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(cancelled(door, run_id))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {
        "run_id": run_id,
        "state": "cancelled",
        "terminal_event_id": door.run(run_id)["terminal_event_id"],
    }
    assert answers == [expected] * 5
    assert [e["event_type"] for e in door.events(run_id)].count("run.cancelled") == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"null", b'{"reason": 7}', b'{"reason": null}', b"\xff\xfe"]
)
def test_a_cancel_is_not_refused_for_its_body(
    door: HttpClient, tmp_path: Path, body: bytes
) -> None:
    run_id = door.start(write_spec(tmp_path, "sandbox"))
    door.wait_type(run_id, "sandbox.ready")
    answer = door.ask("POST", f"/v1/runs/{run_id}/cancel", body)
    assert (answer.status, answer.json["state"]) == (200, "cancelled")
    assert door.run(run_id)["terminal_reason"] == "run marked cancelled"


def test_a_cancel_of_a_run_nobody_knows_is_not_found(api: HttpClient) -> None:
    answer = api.post("/v1/runs/nobody/cancel", {"reason": "x"})
    assert answer.problem == (404, "NOT_FOUND", False)
    assert answer.json["message"] == "run 'nobody' not found"


def test_a_cancel_ends_the_programs_and_everything_of_the_machine(
    house: ApiHouse, door: HttpClient, tmp_path: Path
) -> None:
    run_id = door.start(
        workflow(tmp_path, step("a", "trap '' TERM; (sleep 600 & echo up; wait; sleep 600)"))
    )
    door.wait_log(run_id, "up")
    folder = house.supervisor.state_dir / "runs" / run_id
    assert processes_of(folder)
    door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0.2})
    assert processes_of(folder) == []


def test_the_grace_of_a_runs_policy_is_how_long_a_program_has_to_end(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path, step("a", "trap 'echo ending; exit 0' TERM; echo up; sleep 600 & wait")
    )
    run_id = door.start(spec, policy={"cancel_grace_period_secs": 30})
    door.wait_log(run_id, "up")
    began = time.monotonic()
    assert cancelled(door, run_id)["state"] == "cancelled"
    # It ended by itself: nobody waited out the grace.
    assert time.monotonic() - began < 25
    assert "ending" in door.get(f"/v1/runs/{run_id}/logs").text.splitlines()


def test_a_program_that_does_not_end_is_killed_after_the_grace(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(tmp_path, step("a", "trap '' TERM; echo up; sleep 600"))
    run_id = door.start(spec, policy={"cancel_grace_period_secs": 0})
    door.wait_log(run_id, "up")
    began = time.monotonic()
    assert cancelled(door, run_id)["state"] == "cancelled"
    assert time.monotonic() - began < 20


def test_a_cancel_need_not_be_waited_for(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.start(workflow(tmp_path, step("a", "trap '' TERM; echo up; sleep 600")))
    door.wait_log(run_id, "up")
    answer = door.post(f"/v1/runs/{run_id}/cancel?wait=false", {"grace_secs": 60})
    assert answer.json == {"run_id": run_id, "state": "running", "terminal_event_id": None}
    assert door.run(run_id)["status"] == "running"
    # Asked again with less patience, it is over soon.
    assert door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0}).json["state"] == "cancelled"


@pytest.mark.parametrize("kind", ["agent", "pipeline", "sandbox"])
def test_every_kind_is_cancelled(door: HttpClient, tmp_path: Path, kind: str) -> None:
    if kind == "agent":
        spec = agent(tmp_path, CLAUDIO_TURNS="2", CLAUDIO_DELAY_MS="600000")
    elif kind == "pipeline":
        spec = pipeline(tmp_path, box("p", CLAUDIO_HANG="1"), box("q"))
    else:
        spec = write_spec(tmp_path, "sandbox")
    run_id = door.start(spec)
    door.wait_type(run_id, "sandbox.ready" if kind == "sandbox" else "stage.started")
    answer = door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 1})
    assert answer.json["state"] == "cancelled"
    run = door.run(run_id)
    if kind == "pipeline":
        states = {name: stage["status"] for name, stage in run["stage_states"].items()}
        assert states == {"p": "failed", "q": "skipped"}
    if kind == "agent":
        assert run["stage_states"]["scout"]["status"] == "failed"


def test_a_run_that_has_not_begun_is_cancelled_too(door: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    run_id = door.start(workflow(tmp_path, step("a", opened.wait)))
    assert cancelled(door, run_id)["state"] == "cancelled"
    assert door.run(run_id)["status"] == "cancelled"
