"""Services by HTTP: published while they go on, no time limit, their ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_kit import gate, scripted, write_spec
from http_kit import HttpClient

REPORT = "report.txt"


def service(folder: Path, script: str) -> Path:
    """A service that is a shell script and publishes REPORT."""
    section = {**scripted(script), "mode": "service", "output_file": f"/workspace/{REPORT}"}
    return write_spec(folder, "agent", name="desk", agent=section)


@pytest.mark.parametrize(
    ("end", "status", "reason", "exit_code"),
    [
        ("exit 0", "succeeded", "service exited cleanly", 0),
        ("exit 3", "failed", "service exited with error", 3),
        ("kill -KILL $$", "failed", "service crashed", -1),
    ],
)
def test_the_ends_of_a_service_are_told_apart(
    door: HttpClient, tmp_path: Path, end: str, status: str, reason: str, exit_code: int
) -> None:
    opened = gate(tmp_path)
    run_id = door.start(service(tmp_path, f"echo here > {REPORT}; {opened.wait}; {end}"))
    door.wait_type(run_id, "run.output_ready")
    run = door.run(run_id)
    assert (run["status"], run["terminal_reason"], run["output_ready"]) == ("running", None, True)
    opened.open()
    run = door.wait_end(run_id)
    assert (run["status"], run["terminal_reason"]) == (status, reason)
    assert run["exit_code"] == exit_code
    assert (run["report"]["kind"], run["output_ready"]) == ("service", True)
    # However it ended, what it had published stays.
    (entry,) = run["artifact_publication"]["manifest"]
    assert door.get(entry["retrieval_path"]).body == b"here\n"


def test_a_service_has_no_time_limit(door: HttpClient, tmp_path: Path) -> None:
    script = f"began=$(date +%s); sleep 2; echo $(($(date +%s) - began)) > {REPORT}; exec sleep 600"
    run_id = door.start(
        service(tmp_path, script), policy={"stage_timeout_secs": 1, "max_stage_retries": 0}
    )
    door.wait_type(run_id, "run.output_ready")
    run = door.run(run_id)
    assert run["status"] == "running"
    # By its own clock it is older than a stage may be.
    (entry,) = run["artifact_publication"]["manifest"]
    assert int(door.get(entry["retrieval_path"]).body) > 1
    assert door.post(f"/v1/runs/{run_id}/cancel").json["state"] == "cancelled"
