"""Events as they come, and the log: server-sent events, followers, resuming."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, gate, step, workflow
from http_kit import HttpClient


@pytest.fixture(scope="module")
def ended(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = workflow(
        tmp_path_factory.mktemp("ended"),
        step("talk", "echo one; echo two >&2; echo three"),
        step("more", "cat >/dev/null; echo four", "talk"),
    )
    return house.unix.finish(spec)


def test_a_stream_has_each_event_once_in_order_and_ends_with_the_run(
    api: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    run_id = api.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}; seq 500")))
    api.wait_log(run_id, "up")
    with api.stream(run_id) as stream:
        first = next(stream)
        opened.open()
        frames = [first, *stream]
    events = api.events(run_id)
    assert [frame.event for frame in frames] == events
    assert [frame.id for frame in frames] == [event["event_id"] for event in events]
    assert {frame.name for frame in frames} == {"run-event"}
    assert events[-1]["event_type"] == "run.finished"


def test_a_stream_is_told_from_other_answers_by_its_type(
    api: HttpClient, ended: dict[str, Any]
) -> None:
    answer = api.get(f"/v1/runs/{ended['id']}/events/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    head = api.ask("HEAD", f"/v1/runs/{ended['id']}/events/stream")
    assert (head.status, head.body) == (200, b"")


def test_a_stream_of_a_run_nobody_knows_is_not_found(api: HttpClient) -> None:
    for path in ("events/stream", "logs", "logs?follow=true"):
        assert api.get(f"/v1/runs/nobody/{path}").problem == (404, "NOT_FOUND", False)


def test_a_stream_goes_on_behind_the_event_a_client_saw_last(
    api: HttpClient, ended: dict[str, Any]
) -> None:
    events = ended["events"]
    for at in (0, len(events) // 2, len(events) - 2):
        seen = events[at]["event_id"]
        with api.stream(ended["id"], Last_Event_ID=seen) as stream:
            assert [frame.event for frame in stream] == events[at + 1 :]
        with api.stream(ended["id"], f"?from_event_id={seen}") as stream:
            assert [frame.event for frame in stream] == events[at + 1 :]


def test_a_stream_behind_the_last_event_ends_without_any(
    api: HttpClient, ended: dict[str, Any]
) -> None:
    with api.stream(ended["id"], Last_Event_ID=ended["events"][-1]["event_id"]) as stream:
        assert list(stream) == []


def test_a_stream_behind_an_event_nobody_knows_has_them_all(
    api: HttpClient, ended: dict[str, Any]
) -> None:
    with api.stream(ended["id"], Last_Event_ID="nobody") as stream:
        assert [frame.event for frame in stream] == ended["events"]


def test_a_stream_may_give_events_their_second_name(api: HttpClient, ended: dict[str, Any]) -> None:
    with api.stream(ended["id"], "?api_version=v2") as stream:
        kinds = [frame.event["event_type"] for frame in stream]
    assert kinds == [event["event_type_v2"] for event in ended["events"]]


def test_a_client_that_comes_back_again_and_again_misses_nothing(
    door: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    run_id = door.start(workflow(tmp_path, step("a", f"{opened.wait}; seq 200")))
    seen: list[dict[str, Any]] = []
    opened.open()
    while not seen or seen[-1]["event_type"] != "run.finished":
        headers = {"Last_Event_ID": seen[-1]["event_id"]} if seen else {}
        with door.stream(run_id, **headers) as stream:
            for frame, _ in zip(stream, range(20), strict=False):
                seen.append(frame.event)
    assert seen == door.events(run_id)


def test_many_followers_all_get_everything(
    unix: HttpClient, tcp: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    run_id = unix.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}; seq 300")))
    unix.wait_log(run_id, "up")
    got: list[list[dict[str, Any]]] = []
    ready = threading.Barrier(21)

    def follow(client: HttpClient) -> None:
        with client.stream(run_id) as stream:
            first = next(stream)
            ready.wait(30)
            got.append([first.event, *(frame.event for frame in stream)])

    threads = [
        threading.Thread(target=follow, args=(client,)) for client in (unix, tcp) for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    ready.wait(30)
    opened.open()
    for thread in threads:
        thread.join()
    events = unix.events(run_id)
    assert len(got) == 20
    assert all(each == events for each in got)


def test_a_follower_that_does_not_read_holds_nobody_up_and_loses_nothing(
    unix: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    line = "x" * 500
    script = f"{opened.wait}; yes {line} | head -4000"
    run_id = unix.start(workflow(tmp_path, step("a", script)))
    with unix.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(unix.head_bytes(f"GET /v1/runs/{run_id}/events/stream HTTP/1.1"))
        beginning = slow.recv(100)
        opened.open()
        run = unix.wait_end(run_id)
        assert unix.get("/v1/health").status == 200
        rest = [beginning]
        while chunk := slow.recv(1024 * 1024):
            rest.append(chunk)
    received = b"".join(rest)
    assert received.count(b'"event_type":"log.chunk"') == 4000
    assert received.count(b"\ndata: ") == len(run["events"])


# -- the log -------------------------------------------------------------------------------------


def test_the_log_is_what_programs_printed(api: HttpClient, ended: dict[str, Any]) -> None:
    answer = api.get(f"/v1/runs/{ended['id']}/logs")
    assert answer.headers["content-type"].startswith("text/plain")
    assert sorted(answer.text.split("\n")) == ["", "four", "one", "three", "two"]


@pytest.mark.parametrize(
    ("query", "lines"),
    [
        ("stream=stderr", ["two"]),
        ("stream=stdout", ["one", "three", "four"]),
        ("stage=more", ["four"]),
        ("stage=talk&stream=stdout", ["one", "three"]),
        ("stage=nobody", []),
    ],
)
@pytest.mark.parametrize("follow", ["", "&follow=true"])
def test_the_log_may_be_of_one_stage_and_one_stream(
    door: HttpClient, ended: dict[str, Any], query: str, lines: list[str], follow: str
) -> None:
    answer = door.get(f"/v1/runs/{ended['id']}/logs?{query}{follow}")
    assert answer.text.splitlines() == lines


def test_a_stream_of_the_log_that_is_not_there_is_refused(
    door: HttpClient, ended: dict[str, Any]
) -> None:
    answer = door.get(f"/v1/runs/{ended['id']}/logs?stream=stdin")
    assert answer.problem == (400, "INVALID_PARAMS", False)


def test_a_client_that_will_send_no_more_gets_the_log_there_is(
    api: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    run_id = api.start(workflow(tmp_path, step("a", f"echo one; {opened.wait}")))
    api.wait_log(run_id, "one")
    received = api.raw(
        api.head_bytes(f"GET /v1/runs/{run_id}/logs?follow=true HTTP/1.1"), shut=True
    )
    assert b"one\n" in received
    assert api.run(run_id)["status"] == "running"
    opened.open()


def test_the_log_is_followed_to_the_runs_end(api: HttpClient, tmp_path: Path) -> None:
    opened = gate(tmp_path)
    run_id = api.start(workflow(tmp_path, step("a", f"echo one; {opened.wait}; echo two")))
    with api.open() as connection:
        connection.request("GET", f"/v1/runs/{run_id}/logs?follow=true", headers=api.auth)
        with connection.getresponse() as response:
            assert response.readline() == b"one\n"
            opened.open()
            assert response.read() == b"two\n"
