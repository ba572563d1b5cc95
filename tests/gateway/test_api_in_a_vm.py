"""The main flows by HTTP in real machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import (
    LEAVE_OUTPUT,
    ApiHouse,
    api_house,
    pipeline,
    scripted,
    step,
    structured,
    workflow,
    write_spec,
)
from guest_vm import eventually
from http_kit import HttpClient
from vm_kit import machine_processes

BOOT = 120.0
# Of waiting for a guest's first sample, which comes a second after it is asked for.
_SAMPLED = 30.0
SANDBOX = {"mode": "qemu", "memory_mb": 512}

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def house() -> Iterator[ApiHouse]:
    with api_house() as built:
        yield built


def test_an_agent_in_a_machine_reads_its_inbox_sends_intents_and_leaves_its_output(
    house: ApiHouse, tcp: HttpClient, tmp_path: Path
) -> None:
    spec = write_spec(
        tmp_path,
        "agent",
        name="scout",
        sandbox={**SANDBOX, "env": {"CLAUDIO_TURNS": "1", "CLAUDIO_INTENTS": "2"}},
        llm={"provider": "claude"},
        agent={"prompt": "do it", "messaging": {"enabled": True}},
    )
    run_id = tcp.start(spec, input="look around")
    tcp.wait_type(run_id, "sidecar.started", patience=BOOT)
    entry = {"message_id": "m1", "from_candidate_id": "peer", "kind": "signal", "payload": {}}
    inbox = {"execution_id": "e", "candidate_id": "c", "iteration": 1, "entries": [entry]}
    assert tcp.put(f"/v1/runs/{run_id}/inbox", inbox).json == {"ok": True}
    run = tcp.wait_end(run_id, BOOT)
    assert (run["status"], run["error"]) == ("succeeded", None)
    assert run["machine"].startswith("qemu")
    (result,) = run["artifact_publication"]["manifest"]
    output = tcp.get(result["retrieval_path"]).json
    assert output["inbox_seen"] == ["m1"]
    log = [text for e in run["events"] if (text := (e["payload"] or {}).get("data"))]
    assert output["metrics"]["intents_sent"] == 2, log
    intents = tcp.get(f"/v1/runs/{run_id}/intents").json
    assert [intent["audience"] for intent in intents] == ["broadcast", "leader"]
    assert machine_processes(house.supervisor) == []


def test_a_workflow_in_a_machine_pipes_shares_files_and_publishes_artifacts(
    door: HttpClient, tmp_path: Path
) -> None:
    result = {"status": "ok", "metrics": {}, "artifacts": [{"name": "note.txt"}]}
    spec = workflow(
        tmp_path,
        step("make", "echo hello | tee note.txt"),
        step("out", f"tr a-z A-Z\n{structured(result)}", "make"),
        sandbox=SANDBOX,
        output_step="out",
    )
    run = door.wait_end(door.start(spec), BOOT)
    assert (run["status"], run["error"]) == ("succeeded", None)
    assert run["report"]["output"] == "HELLO\ndone\n"
    for stage in ("out", "main"):
        at = f"/v1/runs/{run['id']}/stages/{stage}"
        assert door.get(f"{at}/output-file").body == json.dumps(result).encode() + b"\n"
        assert door.get(f"{at}/artifacts/note.txt").body == b"hello\n"


def test_the_boxes_of_a_pipeline_have_a_machine_each_and_hand_files_on(
    door: HttpClient, tmp_path: Path
) -> None:
    # proc_sys_kernel(5): each boot of a kernel has another.
    boot = "/proc/sys/kernel/random/boot_id"
    maker = {
        "name": "maker",
        **scripted(f"cat {boot} > output/boot; {LEAVE_OUTPUT}"),
        "outputs": [{"name": "made"}],
    }
    reader = {
        "name": "reader",
        **scripted(f"cat input/boot {boot}; {LEAVE_OUTPUT}"),
        "inputs": [{"from": "made"}],
    }
    run = door.wait_end(door.start(pipeline(tmp_path, maker, reader, sandbox=SANDBOX)), 2 * BOOT)
    assert (run["status"], run["error"]) == ("succeeded", None)
    makers, readers = run["report"]["output"].split()
    assert makers != readers
    started = [e for e in run["events"] if e["event_type"] == "machine.started"]
    assert [event["stage_name"] for event in started] == ["maker", "reader"]
    assert all(event["payload"]["machine"].startswith("qemu") for event in started)
    for entry in run["artifact_publication"]["manifest"]:
        assert door.get(entry["retrieval_path"]).json == {"status": "ok"}


def test_a_cancel_ends_the_machine_before_it_is_answered(
    house: ApiHouse, door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(tmp_path, step("a", "echo up; sleep 600"), sandbox=SANDBOX)
    run_id = door.start(spec)
    door.wait_log(run_id, "up", BOOT)
    assert len(machine_processes(house.supervisor)) == 1
    assert door.run(run_id)["active_microvm_count"] == 1
    answer = door.post(f"/v1/runs/{run_id}/cancel", {"reason": "enough"})
    assert answer.json["state"] == "cancelled"
    assert machine_processes(house.supervisor) == []
    assert door.run(run_id)["active_microvm_count"] == 0


def test_a_service_publishes_while_its_machine_is_sampled_and_a_cancel_ends_it(
    house: ApiHouse, door: HttpClient, tmp_path: Path
) -> None:
    serve = {"CLAUDIO_TURNS": "100000", "CLAUDIO_DELAY_MS": "500", "CLAUDIO_SERVE": "1"}
    spec = write_spec(
        tmp_path,
        "agent",
        name="desk",
        sandbox={**SANDBOX, "env": serve},
        llm={"provider": "claude"},
        agent={"prompt": "serve", "mode": "service", "output_file": "/workspace/report.json"},
    )
    run_id = door.start(spec)
    door.wait_type(run_id, "run.output_ready", patience=BOOT)
    run = door.run(run_id)
    assert (run["status"], run["output_ready"]) == ("running", True)
    assert run["artifact_publication"]["status"] == "published"
    (entry,) = run["artifact_publication"]["manifest"]
    first = door.get(entry["retrieval_path"]).json
    assert first["status"] == "serving"
    door.wait_type(run_id, "run.output_updated", patience=BOOT)
    assert door.get(entry["retrieval_path"]).json["turn"] > first["turn"]
    # Its program occupies the guest all the while.
    assert first_guest_sample(door, run_id)["memory_total_bytes"] > 256 * 1024 * 1024
    # It ends when it is told to: with a grace longer than any answer takes, nobody waits that out.
    answer = door.post(f"/v1/runs/{run_id}/cancel", {"reason": "seen enough", "grace_secs": 600})
    assert answer.json["state"] == "cancelled"
    assert machine_processes(house.supervisor) == []
    run = door.run(run_id)
    assert (run["status"], run["terminal_reason"]) == ("cancelled", "seen enough")
    assert door.get(entry["retrieval_path"]).json["status"] == "serving", "it is still there"


def first_guest_sample(api: HttpClient, run_id: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def sampled() -> bool:
        samples = api.get(f"/v1/runs/{run_id}/telemetry").json["samples"]
        found.extend(sample["guest"] for sample in samples if "guest" in sample)
        return bool(found)

    assert eventually(sampled, _SAMPLED)
    return found[0]
