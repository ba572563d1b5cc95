"""Many runs at once, many events, many followers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, gate, step, workflow
from guest_vm import eventually
from http_kit import Answer, HttpClient

RUNS = 200
BAD = 400
FOLLOWERS = 50
EVENTS = 5000
SECONDS = 5


def active(api: HttpClient) -> tuple[int, int]:
    """How many machines are up and how many stages run, of all runs."""
    shown = dict(
        line.split() for line in api.get("/metrics").text.splitlines() if line.count(" ") == 1
    )
    machines, stages = shown["voidbus_machines_active"], shown["voidbus_stages_active"]
    return int(float(machines)), int(float(stages))


@pytest.mark.timeout(240)
def test_two_hundred_runs_at_once_all_end_well(
    house: ApiHouse, door: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    script = f"{opened.wait_with_others}; echo done"
    spec = workflow(tmp_path, step("a", script))
    answers: list[Answer] = []
    lock = threading.Lock()

    def start(some: int) -> None:
        with door.open() as connection:
            for _ in range(some):
                answer = door.ask("POST", "/v1/runs", {"file": str(spec)}, connection=connection)
                with lock:
                    answers.append(answer)

    threads = [threading.Thread(target=start, args=(RUNS // 10,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer for answer in answers if answer.status != 200] == []
    started = [answer.json["run_id"] for answer in answers]
    assert len(set(started)) == RUNS
    # None goes on before all are there, each with its machine and its stage.
    assert eventually(lambda: active(door) == (RUNS, RUNS), 200)
    listed = door.get("/v1/runs?state=active").json["runs"]
    assert {run["id"] for run in listed} == set(started)
    assert {(run["active_stage_count"], run["active_microvm_count"]) for run in listed} == {(1, 1)}
    with opened.held_open():
        ended = [door.wait_end(run_id, 200) for run_id in started]
    for run in ended:
        assert (run["status"], run["report"]["output"]) == ("succeeded", "done\n")
        assert [event["seq"] for event in run["events"]] == list(range(len(run["events"])))
    assert door.get("/v1/runs?state=active").json == {"runs": []}
    terminal = {run["id"] for run in door.get("/v1/runs?state=terminal").json["runs"]}
    assert set(started) <= terminal


def test_starts_in_the_same_moment_are_runs_of_their_own(door: HttpClient, tmp_path: Path) -> None:
    """Those that fail at once too, whose ids are free again before the next start."""
    file = str(tmp_path / "nothing.yaml")
    answers: list[Answer] = []

    def start() -> None:
        with door.open() as connection:
            for _ in range(BAD // 20):
                answer = door.ask("POST", "/v1/runs", {"file": file}, connection=connection)
                answers.append(answer)

    threads = [threading.Thread(target=start) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer for answer in answers if answer.status != 200] == []
    assert len({answer.json["run_id"] for answer in answers}) == BAD


@pytest.fixture
def paced(tmp_path: Path) -> str:
    """A script that prints a thousand lines a second."""
    program = tmp_path / "paced.py"
    program.write_text(
        "import select, sys, time\n"
        "began = time.monotonic()\n"
        f"for number in range({EVENTS}):\n"
        f"    due = began + number * {SECONDS} / {EVENTS}\n"
        "    if number % 10 == 0 and (left := due - time.monotonic()) > 0:\n"
        "        select.select([], [], [], left)\n"
        "    sys.stdout.write(f'{number}\\n')\n"
        "    sys.stdout.flush()\n"
    )
    return f"python3 {program}"


@pytest.mark.timeout(240)
def test_fifty_followers_of_a_thousand_events_a_second_lose_none(
    unix: HttpClient, tcp: HttpClient, tmp_path: Path, paced: str
) -> None:
    opened = gate(tmp_path)
    run_id = unix.start(workflow(tmp_path, step("a", f"echo up; {opened.wait}; {paced}")))
    unix.wait_log(run_id, "up")
    got: list[list[int]] = []
    wrong: list[Any] = []
    ready = threading.Barrier(FOLLOWERS + 1)

    def follow(client: HttpClient) -> None:
        patient = HttpClient(client.where, client.token, timeout=200)
        with patient.stream(run_id) as stream:
            seqs = [next(stream).event["seq"]]
            ready.wait(60)
            for frame in stream:
                seqs.append(frame.event["seq"])
                if seqs[-1] != seqs[-2] + 1:
                    wrong.append(seqs[-2:])
        got.append(seqs)

    threads = [
        threading.Thread(target=follow, args=(tcp if number % 2 else unix,))
        for number in range(FOLLOWERS)
    ]
    for thread in threads:
        thread.start()
    ready.wait(60)
    began = time.monotonic()
    opened.open()
    # Others are served meanwhile.
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        asked = time.monotonic()
        assert unix.get("/v1/health").status == 200
        slowest = max(slowest, time.monotonic() - asked)
        threads[0].join(0.5)
        if not threads[0].is_alive():
            for thread in threads:
                thread.join()
    took = time.monotonic() - began
    events = unix.events(run_id)
    lines = [e["payload"]["data"] for e in events if e["event_type"] == "log.chunk"]
    assert lines[1:] == [str(number) for number in range(EVENTS)]
    assert wrong == []
    assert len(got) == FOLLOWERS
    assert all(seqs == list(range(len(events))) for seqs in got)
    # Fifty clients that parse JSON in one process take their time; the API must not.
    assert slowest < 20, (slowest, took)
