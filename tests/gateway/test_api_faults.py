"""What clients are told when it is the host that fails: errors they may try again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_kit import ApiHouse, agent, api_house, gate, step, structured, workflow
from http_kit import HttpClient

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.supervisor import StopSupervisor

INBOX = {"execution_id": "e", "candidate_id": "c", "iteration": 1, "entries": []}


@contextlib.contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    """A folder that is not there for a while."""
    elsewhere = folder.with_name(folder.name + ".elsewhere")
    folder.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(folder)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def disk_full(pid: int) -> Iterator[None]:
    """A process that can make no file longer, as on a disk that is full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_artifacts_whose_store_is_away_may_be_asked_for_again(
    api: HttpClient, house: ApiHouse, tmp_path: Path
) -> None:
    result = {"status": "ok", "artifacts": [{"name": "note"}]}
    script = structured(result, ("note", "kept"))
    run_id = api.finish(workflow(tmp_path, step("a", script), output_step="a"))["id"]
    at = f"/v1/runs/{run_id}/stages/a"
    with moved_away(house.supervisor.state_dir / "artifacts"):
        for path in ("output-file", "artifacts/note"):
            answer = api.get(f"{at}/{path}")
            assert answer.problem == (503, "ARTIFACT_STORE_UNAVAILABLE", True)
        assert api.run(run_id)["status"] == "succeeded"
    assert api.get(f"{at}/output-file").json == result
    assert api.get(f"{at}/artifacts/note").body == b"kept"


def test_a_run_that_does_not_answer_is_a_timeout_and_not_waited_for_longer(
    door: HttpClient, house: ApiHouse, tmp_path: Path
) -> None:
    run_id = door.start(agent(tmp_path, CLAUDIO_HANG="1"))
    door.wait_type(run_id, "stage.started")
    with house.supervisor.connect() as client:
        pid = client.state(run_id).run_process
    assert pid is not None
    with stopped(pid):
        answer = door.put(f"/v1/runs/{run_id}/inbox", INBOX)
        assert answer.problem == (504, "RETRIEVAL_TIMEOUT", True)
    assert door.put(f"/v1/runs/{run_id}/inbox", INBOX).json == {"ok": True}
    assert door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0}).json["state"] == "cancelled"


def test_a_disk_that_takes_nothing_more_is_an_error_and_what_was_kept_is_read(
    api: HttpClient, house: ApiHouse, tmp_path: Path
) -> None:
    run = api.finish(workflow(tmp_path, step("a", "true")))
    said = {"role": "user", "content": "x" * 100_000}
    name = "full-tcp" if api.token else "full-unix"
    session = f"/v1/sessions/{name}/messages"
    assert house.supervisor.process is not None
    with disk_full(house.supervisor.process.pid):
        answer = api.post(session, said)
        assert answer.problem == (500, "INTERNAL_ERROR", True)
        started = api.post("/v1/runs", {"file": run["file"], "run_id": name})
        assert started.problem == (500, "INTERNAL_ERROR", True)
        assert api.run(run["id"]) == run
    assert api.get(session).json == []
    assert api.post(session, said).status == 200
    assert api.finish(run["file"], run_id=name)["status"] == "succeeded"


@pytest.fixture
def other() -> Iterator[ApiHouse]:
    with api_house() as built:
        yield built


def test_a_supervisor_that_is_stopping_starts_nothing_and_answers_what_it_is_asked(
    other: ApiHouse, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    spec = workflow(tmp_path, step("a", f"echo up; {opened.wait}"))
    run_id = other.unix.start(spec)
    other.unix.wait_log(run_id, "up")
    with other.supervisor.connect() as client:
        stopping = client.ask("root", StopSupervisor(runs="finish", deadline=30.0))
    assert isinstance(stopping, Accepted)
    answer = other.unix.post("/v1/runs", {"file": str(spec)})
    assert answer.problem == (503, "INTERNAL_ERROR", True)
    assert other.tcp.run(run_id)["status"] == "running"
    opened.open()
    assert other.supervisor.process is not None
    assert other.supervisor.process.wait(20) == 0
