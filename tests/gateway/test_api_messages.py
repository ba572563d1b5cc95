"""The sidecar bridge and sessions (contract 1.12, 1.13, 5.2)."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, agent, step, workflow
from http_kit import HttpClient

ENTRY = {
    "message_id": "m1",
    "from_candidate_id": "peer",
    "kind": "signal",
    "payload": {"a": [1, None]},
}
INBOX = {
    "version": 5,
    "execution_id": "exec",
    "candidate_id": "cand",
    "iteration": 2,
    "entries": [ENTRY],
}


@pytest.fixture(scope="module")
def waiting(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An agent with a sidecar that goes on until the tests are done."""
    spec = agent(tmp_path_factory.mktemp("waiting"), CLAUDIO_HANG="1")
    run_id = house.unix.start(spec)
    house.unix.wait_type(run_id, "stage.started")
    yield run_id
    house.unix.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0})


def sidecar(api: HttpClient, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.run(run_id)["sidecar"]
    return found


def test_an_inspected_run_shows_its_sidecar_while_there_is_one(
    api: HttpClient, waiting: str
) -> None:
    state = sidecar(api, waiting)
    assert set(state) == {"status", "buffer_depth", "inbox_version"}
    assert state["status"] == "ok"
    listed = api.get("/v1/runs?state=active").json["runs"]
    assert all("sidecar" not in run for run in listed)


def test_an_inbox_is_replaced_whole_whatever_its_version(api: HttpClient, waiting: str) -> None:
    for version in (5, 9, 3):
        answer = api.put(f"/v1/runs/{waiting}/inbox", {**INBOX, "version": version})
        assert (answer.status, answer.json) == (200, {"ok": True})
        assert sidecar(api, waiting)["inbox_version"] == version


def test_an_inbox_without_a_version_is_the_one_after(api: HttpClient, waiting: str) -> None:
    api.put(f"/v1/runs/{waiting}/inbox", {**INBOX, "version": 7})
    unversioned = {key: value for key, value in INBOX.items() if key != "version"}
    # As void-control sends it: no version, and entries with one key more.
    unversioned["entries"] = [{**ENTRY, "intent_id": "int-1"}]
    answer = api.put(f"/v1/runs/{waiting}/inbox", unversioned)
    assert (answer.status, answer.json) == (200, {"ok": True})
    assert sidecar(api, waiting)["inbox_version"] == 8


def inbox(**fields: object) -> bytes:
    return json.dumps({**INBOX, **fields}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        inbox(version=-1),
        inbox(version="5"),
        inbox(iteration="x"),
        inbox(iteration=None),
        inbox(entries=None),
        inbox(entries=[{}]),
        inbox(execution_id=None),
        inbox(candidate_id=7),
    ],
)
def test_an_inbox_that_is_not_one_is_refused_before_the_run_is_looked_for(
    door: HttpClient, waiting: str, body: bytes
) -> None:
    for run_id in (waiting, "nobody"):
        answer = door.ask("PUT", f"/v1/runs/{run_id}/inbox", body)
        assert answer.problem == (400, "INVALID_PARAMS", False)


@pytest.mark.parametrize("missing", ["message_id", "from_candidate_id", "kind", "payload"])
def test_a_message_needs_all_four_fields(door: HttpClient, waiting: str, missing: str) -> None:
    entry = {key: value for key, value in ENTRY.items() if key != missing}
    for run_id in (waiting, "nobody"):
        answer = door.post(f"/v1/runs/{run_id}/messages", entry)
        assert answer.problem == (400, "INVALID_PARAMS", False)


def test_without_a_sidecar_there_is_nothing_to_reach(api: HttpClient, tmp_path: Path) -> None:
    ended = api.finish(agent(tmp_path, messaging=False))["id"]
    for run_id in ("nobody", ended):
        for answer in (
            api.put(f"/v1/runs/{run_id}/inbox", INBOX),
            api.post(f"/v1/runs/{run_id}/messages", ENTRY),
        ):
            assert answer.problem == (404, "NOT_FOUND", False)
            assert answer.json["message"] == "no sidecar for run"
    assert api.get("/v1/runs/nobody/intents").problem == (404, "NOT_FOUND", False)


def test_a_run_without_messaging_has_no_sidecar(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.start(workflow(tmp_path, step("a", "echo up; sleep 600")))
    door.wait_log(run_id, "up")
    assert "sidecar" not in door.run(run_id)
    for answer in (
        door.get(f"/v1/runs/{run_id}/intents"),
        door.put(f"/v1/runs/{run_id}/inbox", INBOX),
    ):
        assert answer.problem == (404, "NOT_FOUND", False)
        assert answer.json["message"] == "no sidecar for run"
    door.post(f"/v1/runs/{run_id}/cancel", {"grace_secs": 0})


def test_an_agent_reads_its_inbox_and_its_intents_are_taken_once(
    api: HttpClient, tmp_path: Path
) -> None:
    run_id = api.start(agent(tmp_path, CLAUDIO_INTENTS="2", CLAUDIO_DELAY_MS="1500"))
    api.wait_type(run_id, "stage.started")
    pushed = {**ENTRY, "message_id": "pushed"}
    assert api.put(f"/v1/runs/{run_id}/inbox", INBOX).json == {"ok": True}
    assert api.post(f"/v1/runs/{run_id}/messages", pushed).json == {"ok": True}
    run = api.wait_end(run_id)
    assert run["status"] == "succeeded"
    assert "sidecar" not in run
    output = api.get(f"/v1/runs/{run_id}/stages/scout/output-file").json
    assert output["inbox_seen"] == ["m1", "pushed"]
    # They are not lost with the run.
    intents = api.get(f"/v1/runs/{run_id}/intents").json
    assert [intent["kind"] for intent in intents] == ["signal", "evaluation"]
    assert [intent["audience"] for intent in intents] == ["broadcast", "leader"]
    for intent in intents:
        assert set(intent) == {
            "intent_id",
            "from_candidate_id",
            "iteration",
            "kind",
            "audience",
            "payload",
            "priority",
            "ttl_iterations",
        }
        assert uuid.UUID(intent["intent_id"].removeprefix("int-"))
        assert (intent["iteration"], intent["ttl_iterations"]) == (2, 2)
        assert intent["priority"] == "normal"
        assert set(intent["payload"]) == {"summary_text"}
    assert api.get(f"/v1/runs/{run_id}/intents").json == []


def test_intents_are_taken_while_the_run_goes_on(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.start(agent(tmp_path, CLAUDIO_INTENTS="1"))
    door.wait_type(run_id, "sidecar.intent_accepted")
    (intent,) = door.get(f"/v1/runs/{run_id}/intents").json
    assert intent["kind"] == "signal"
    door.wait_end(run_id)
    assert door.get(f"/v1/runs/{run_id}/intents").json == []


def test_a_message_pushed_before_there_is_an_inbox_makes_one(
    door: HttpClient, tmp_path: Path
) -> None:
    run_id = door.start(agent(tmp_path, CLAUDIO_DELAY_MS="1500"))
    door.wait_type(run_id, "stage.started")
    assert door.post(f"/v1/runs/{run_id}/messages", ENTRY).json == {"ok": True}
    door.wait_end(run_id)
    output = door.get(f"/v1/runs/{run_id}/stages/scout/output-file").json
    assert output["inbox_seen"] == ["m1"]


# -- sessions ------------------------------------------------------------------------------------


def test_what_is_said_in_a_session_is_kept_in_order(api: HttpClient) -> None:
    path = f"/v1/sessions/s-{uuid.uuid4()}/messages"
    empty = api.get(path)
    assert (empty.status, empty.json) == (200, [])
    said = []
    for number in range(3):
        answer = api.post(path, {"role": "user", "content": f"line {number}\nü", "more": 1})
        assert answer.status == 200
        message = answer.json
        assert set(message) == {"ts_ms", "role", "content"}
        assert (message["role"], message["content"]) == ("user", f"line {number}\nü")
        assert isinstance(message["ts_ms"], int)
        said.append(message)
    assert api.get(path).json == said


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"role": "user"}', b'{"content": "x"}', b'{"role": 1, "content": ""}'],
)
def test_a_message_of_a_session_that_is_not_one_is_refused(door: HttpClient, body: bytes) -> None:
    answer = door.ask("POST", "/v1/sessions/s/messages", body)
    assert answer.problem == (400, "INVALID_SPEC", False)


def test_sessions_are_apart_and_their_names_are_no_paths(door: HttpClient, house: ApiHouse) -> None:
    before = sorted(house.supervisor.state_dir.parent.rglob("*"))
    for name in ("..%2F..%2Fup", "%2Fetc%2Fpasswd", "a%20b", "%C3%BC", "..%5Cx"):
        path = f"/v1/sessions/{name}/messages"
        assert door.post(path, {"role": "user", "content": name}).status == 200
        assert [message["content"] for message in door.get(path).json] == [name]
    after = sorted(house.supervisor.state_dir.parent.rglob("*"))
    assert [path for path in after if path not in before and "journal" not in path.name] == []


def test_messages_of_a_session_that_come_at_once_are_all_kept(door: HttpClient) -> None:
    path = f"/v1/sessions/s-{uuid.uuid4()}/messages"

    def say(number: int) -> None:
        door.post(path, {"role": "user", "content": str(number)})

    threads = [threading.Thread(target=say, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(message["content"]) for message in door.get(path).json) == list(range(16))
