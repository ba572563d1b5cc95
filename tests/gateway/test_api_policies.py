"""What a policy holds agents and the boxes of pipelines to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_kit import LEAVE_OUTPUT, pipeline, scripted, write_spec
from http_kit import HttpClient


@pytest.fixture(params=["agent", "pipeline"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scripted_run(folder: Path, kind: str, script: str, **fields: Any) -> Path:
    """An agent, or a pipeline of one box, whose only stage `it` is this script."""
    section = {**scripted(script), **fields}
    if kind == "agent":
        return write_spec(folder, "agent", name="it", agent=section)
    return pipeline(folder, {"name": "it", **section})


def attempts(run: dict[str, Any]) -> list[tuple[str, int]]:
    """How each attempt of the stages ended, and its number."""
    return [
        (event["event_type"].removeprefix("stage."), event["payload"]["stage_attempt"])
        for event in run["events"]
        if event["event_type"] in ("stage.failed", "stage.completed")
    ]


def third_time_lucky(folder: Path) -> str:
    """A script that fails twice. It counts on the host: a box's machine is new each time."""
    tries = folder / "tries"
    return f"echo x >> {tries}; test $(wc -l < {tries}) -ge 3 || exit 1; {LEAVE_OUTPUT}; echo good"


def test_an_agent_and_a_box_are_tried_as_often_as_the_policy_says_and_no_more(
    door: HttpClient, tmp_path: Path, kind: str
) -> None:
    spec = scripted_run(tmp_path, kind, third_time_lucky(tmp_path))
    run = door.finish(spec, policy={"max_stage_retries": 1})
    assert run["status"] == "failed"
    assert attempts(run) == [("failed", 1), ("failed", 2)]
    assert run["stage_states"]["it"]["status"] == "failed"


def test_an_agent_and_a_box_that_succeed_at_last_have_succeeded(
    door: HttpClient, tmp_path: Path, kind: str
) -> None:
    spec = scripted_run(tmp_path, kind, third_time_lucky(tmp_path))
    run = door.finish(spec, policy={"max_stage_retries": 2})
    assert (run["status"], run["report"]["output"]) == ("succeeded", "good")
    assert attempts(run) == [("failed", 1), ("failed", 2), ("completed", 3)]
    machines = [event["event_type"] for event in run["events"]].count("machine.started")
    assert machines == (1 if kind == "agent" else 3)
    (stage,) = door.get(f"/v1/runs/{run['id']}/stages").json["stages"]
    assert (stage["status"], stage["stage_attempt"]) == ("succeeded", 3)


def test_the_policys_time_is_each_attempts(door: HttpClient, tmp_path: Path, kind: str) -> None:
    been = tmp_path / "been"
    script = f"test -e {been} || {{ touch {been}; exec sleep 600; }}; {LEAVE_OUTPUT}"
    run = door.finish(
        scripted_run(tmp_path, kind, script),
        policy={"stage_timeout_secs": 3, "max_stage_retries": 1},
    )
    assert (run["status"], run["error"]) == ("succeeded", None)
    assert attempts(run) == [("failed", 1), ("completed", 2)]
    (failed,) = [e for e in run["events"] if e["event_type"] == "stage.failed"]
    assert "after 3s" in failed["payload"]["error"]
    assert failed["payload"]["duration_ms"] >= 3000


def test_an_agents_and_a_boxs_own_time_stands_over_the_policys(
    door: HttpClient, tmp_path: Path, kind: str
) -> None:
    spec = scripted_run(tmp_path, kind, f"sleep 1.5; {LEAVE_OUTPUT}", timeout_secs=30)
    run = door.finish(spec, policy={"stage_timeout_secs": 1, "max_stage_retries": 0})
    assert (run["status"], run["error"]) == ("succeeded", None)
