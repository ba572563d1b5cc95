"""Runs outlive the supervisor, and clients of the API see no gap."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from api_kit import (
    ApiHouse,
    agent,
    api_house,
    gate,
    scripted,
    step,
    structured,
    workflow,
    write_spec,
)
from http_kit import HttpClient


@pytest.fixture(scope="module")
def house() -> Iterator[ApiHouse]:
    """One that is killed: what it writes at its ends is not looked at."""
    with api_house() as built:
        yield built


def test_a_run_goes_on_while_the_supervisor_is_killed_and_started_again(
    house: ApiHouse, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    script = f"echo before; {opened.wait}; echo after; {structured({'status': 'ok'})}"
    run_id = house.unix.start(workflow(tmp_path, step("a", script), output_step="a"))
    house.unix.wait_log(run_id, "before")
    seen = house.unix.events(run_id)
    house.supervisor.kill()
    # It goes on meanwhile, and what it does is not lost.
    opened.open()
    house.supervisor.start()
    house.wait_up()
    events = list(seen)
    while events[-1]["event_type"] != "run.finished":
        marker = events[-1]["event_id"]
        new = house.tcp.get(f"/v1/runs/{run_id}/events?from_event_id={marker}").json
        if not new:  # nothing yet: a stream tells when there is
            with house.tcp.stream(run_id, Last_Event_ID=marker) as stream:
                next(stream, None)
        events += new
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert events == house.unix.events(run_id)
    run = house.unix.run(run_id)
    assert run["status"] == "succeeded"
    assert [e["event_type"] for e in events].count("run.started") == 1
    assert house.tcp.get(f"/v1/runs/{run_id}/stages/a/output-file").json == {"status": "ok"}


def test_a_follower_goes_on_behind_what_it_saw_before_the_supervisor_was_killed(
    house: ApiHouse, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    run_id = house.unix.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}; seq 50")))
    seen = []
    with house.unix.stream(run_id) as stream:
        for frame in stream:
            seen.append(frame.event)
            if frame.event["event_type"] == "log.chunk":
                break
        house.restart()
        assert list(stream) == []  # it is told by the end of its stream
    opened.open()
    with house.unix.stream(run_id, Last_Event_ID=seen[-1]["event_id"]) as stream:
        seen += [frame.event for frame in stream]
    assert seen == house.unix.events(run_id)
    assert seen[-1]["event_type"] == "run.finished"


def test_an_agent_can_be_reached_and_cancelled_after_a_restart(
    house: ApiHouse, tmp_path: Path
) -> None:
    run_id = house.unix.start(agent(tmp_path, CLAUDIO_HANG="1"))
    house.unix.wait_type(run_id, "stage.started")
    house.restart()
    entry = {"message_id": "m", "from_candidate_id": "c", "kind": "signal", "payload": {}}
    pushed = house.unix.post(f"/v1/runs/{run_id}/messages", entry)
    assert (pushed.status, pushed.json) == (200, {"ok": True})
    assert house.unix.run(run_id)["sidecar"]["status"] == "ok"
    ended = house.unix.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0})
    assert ended.json["state"] == "cancelled"


def test_a_message_to_a_run_whose_process_is_on_its_way_back_is_not_refused(
    house: ApiHouse, tmp_path: Path
) -> None:
    run_id = house.unix.start(agent(tmp_path, CLAUDIO_HANG="1"))
    house.unix.wait_type(run_id, "stage.started")
    with house.supervisor.connect() as client:
        process = client.state(run_id).run_process
    assert process is not None
    entry = {"message_id": "m", "from_candidate_id": "c", "kind": "signal", "payload": {}}
    with ThreadPoolExecutor(1) as pool:
        os.kill(process, signal.SIGSTOP)
        try:
            house.restart()
            answer = pool.submit(house.unix.post, f"/v1/runs/{run_id}/messages", entry)
            with pytest.raises(TimeoutError):
                answer.result(0.5)
        finally:
            os.kill(process, signal.SIGCONT)
        assert (answer.result(60).status, answer.result().json) == (200, {"ok": True})
    house.unix.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0})


def test_a_service_goes_on_publishing_while_the_supervisor_is_killed_and_started_again(
    house: ApiHouse, tmp_path: Path
) -> None:
    more, end = gate(tmp_path), gate(tmp_path)
    script = f"echo one > out.txt; {more.wait}; echo two > out.txt; {end.wait}"
    section = {**scripted(script), "mode": "service", "output_file": "/workspace/out.txt"}
    run_id = house.unix.start(write_spec(tmp_path, "agent", name="desk", agent=section))
    house.unix.wait_type(run_id, "run.output_ready")
    before = house.unix.run(run_id)
    (entry,) = before["artifact_publication"]["manifest"]
    house.restart()
    run = house.tcp.run(run_id)
    assert (run["status"], run["output_ready"]) == ("running", True)
    assert run["artifact_publication"] == before["artifact_publication"]
    assert house.tcp.get(entry["retrieval_path"]).body == b"one\n"
    more.open()
    house.tcp.wait_type(run_id, "run.output_updated")
    assert house.tcp.get(entry["retrieval_path"]).body == b"two\n"
    end.open()
    run = house.tcp.wait_end(run_id)
    assert (run["status"], run["terminal_reason"]) == ("succeeded", "service exited cleanly")
    assert house.unix.get(entry["retrieval_path"]).body == b"two\n"


def test_what_was_there_before_is_there_after(house: ApiHouse, tmp_path: Path) -> None:
    good = house.unix.finish(agent(tmp_path))
    bad = house.unix.finish(tmp_path / "nothing.yaml")
    house.unix.post("/v1/sessions/kept/messages", {"role": "user", "content": "hello"})
    before = house.unix.get("/v1/sessions/kept/messages").json
    house.restart()
    for run in (good, bad):
        assert house.tcp.run(run["id"]) == run
        again = house.tcp.post("/v1/runs", {"file": run["file"], "run_id": run["id"]})
        assert again.problem == (409, "ALREADY_TERMINAL", False)
    assert house.unix.get("/v1/sessions/kept/messages").json == before
    # Not even the intents are lost.
    assert [i["kind"] for i in house.unix.get(f"/v1/runs/{good['id']}/intents").json] == ["signal"]


def test_a_start_is_accepted_once_whatever_happens_to_the_supervisor(
    house: ApiHouse, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    spec = workflow(tmp_path, step("a", f"echo up; {opened.wait}"))
    body = {"file": str(spec), "run_id": "once"}
    first = house.unix.post("/v1/runs", body)
    house.unix.wait_log("once", "up")
    house.restart()
    second = house.unix.post("/v1/runs", body)
    assert (first.status, second.status) == (200, 200)
    assert first.json == second.json
    opened.open()
    run = house.unix.wait_end("once")
    assert [event["event_type"] for event in run["events"]].count("stage.started") == 1


def test_clients_that_connect_while_it_is_down_are_refused_and_not_kept(house: ApiHouse) -> None:
    house.supervisor.kill()
    with pytest.raises(ConnectionRefusedError):
        HttpClient(house.unix.where).get("/v1/health")
    house.supervisor.start()
    house.wait_up()
