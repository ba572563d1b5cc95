"""Agents and pipelines by HTTP (contract 3.1, 3.3), and the client they are for (5.5)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from api_kit import (
    LEAVE_OUTPUT,
    agent,
    box,
    gate,
    pipeline,
    scripted,
    step,
    structured,
    workflow,
    write_spec,
)
from http_kit import TERMINAL, HttpClient


def stage_events(run: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (event["event_type"].removeprefix("stage."), event["stage_name"])
        for event in run["events"]
        if event["event_type"].startswith("stage.")
    ]


# -- an agent ------------------------------------------------------------------------------------


def test_an_agents_stage_and_box_are_named_as_the_specification(
    door: HttpClient, tmp_path: Path
) -> None:
    run = door.finish(agent(tmp_path))
    assert stage_events(run) == [("queued", "scout"), ("started", "scout"), ("completed", "scout")]
    of_stage = [e for e in run["events"] if e["event_type"].startswith("stage.")]
    assert {(e["box_name"], e["group_id"]) for e in of_stage} == {("scout", "g0")}
    report = run["report"]
    assert (report["name"], report["kind"], report["stages"]) == ("scout", "agent", 1)
    assert report["output"] == "Finished 1 turns."
    assert report["input_tokens"] > 0
    assert report["output_tokens"] > 0
    assert report["total_cost_usd"] > 0


@pytest.mark.parametrize("output_file", [None, "/workspace/deep/answer.json"])
def test_an_agent_is_told_where_to_write_and_that_file_is_its_output(
    door: HttpClient, tmp_path: Path, output_file: str | None
) -> None:
    section: dict[str, Any] = {"prompt": "do it"}
    if output_file is not None:
        section["output_file"] = output_file
    spec = write_spec(tmp_path, "agent", llm={"provider": "claude"}, agent=section)
    run = door.finish(spec)
    assert run["status"] == "succeeded"
    (entry,) = run["artifact_publication"]["manifest"]
    assert door.get(entry["retrieval_path"]).json["status"] == "success"


def test_an_agents_input_is_in_its_prompt_and_in_a_file(door: HttpClient, tmp_path: Path) -> None:
    # claudio counts its prompt's tokens, four characters each.
    spec = agent(tmp_path, messaging=False)
    without = door.finish(spec)["report"]["input_tokens"]
    small = door.finish(spec, input="x" * 400)["report"]["input_tokens"]
    large = door.finish(spec, input="x" * 40_000)["report"]["input_tokens"]
    huge = door.finish(spec, input="x" * 80_000)["report"]["input_tokens"]
    assert without < small < large == huge


def test_an_agent_that_reports_an_error_fails_its_stage_and_the_run(
    door: HttpClient, tmp_path: Path
) -> None:
    run = door.finish(agent(tmp_path, messaging=False, CLAUDIO_FAIL="it broke"))
    assert (run["status"], run["error"]) == ("failed", "it broke")
    failed = next(e for e in run["events"] if e["event_type"] == "stage.failed")
    assert failed["payload"]["exit_code"] == 1
    assert run["stage_states"]["scout"]["status"] == "failed"


def test_an_agents_exit_code_alone_is_no_error(door: HttpClient, tmp_path: Path) -> None:
    run = door.finish(agent(tmp_path, messaging=False, CLAUDIO_EXIT_CODE="3"))
    assert run["status"] == "succeeded"


def test_an_agents_stream_may_have_lines_that_are_no_json(door: HttpClient, tmp_path: Path) -> None:
    assert door.finish(agent(tmp_path, CLAUDIO_GARBAGE="1"))["status"] == "succeeded"


def test_an_agent_is_tried_again_and_what_all_attempts_cost_is_added(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = agent(tmp_path, messaging=False, CLAUDIO_FAIL="no")
    once = door.finish(spec, policy={"max_stage_retries": 0})
    twice = door.finish(spec, policy={"max_stage_retries": 1})
    assert [kind for kind, _ in stage_events(twice)].count("failed") == 2
    assert twice["report"]["input_tokens"] == 2 * once["report"]["input_tokens"]


def test_a_service_is_not_tried_again(door: HttpClient, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        "agent",
        sandbox={"mode": "mock", "env": {"CLAUDIO_TURNS": "1", "CLAUDIO_FAIL": "no"}},
        llm={"provider": "claude"},
        agent={"prompt": "do it", "mode": "service", "output_file": "/workspace/out.json"},
    )
    once = door.finish(spec, policy={"max_stage_retries": 0})
    run = door.finish(spec, policy={"max_stage_retries": 3})
    assert (run["status"], run["terminal_reason"]) == ("failed", "service exited with error")
    assert run["report"]["input_tokens"] == once["report"]["input_tokens"] > 0


def test_interactive_is_an_ordinary_task(door: HttpClient, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        "agent",
        llm={"provider": "claude"},
        agent={"prompt": "do it", "mode": "interactive"},
    )
    assert door.finish(spec)["status"] == "succeeded"


# -- a pipeline ----------------------------------------------------------------------------------


def test_boxes_run_one_after_another_each_on_a_machine_of_its_own(
    door: HttpClient, tmp_path: Path
) -> None:
    run = door.finish(pipeline(tmp_path, box("p"), box("q")))
    assert stage_events(run) == [
        ("queued", "p"),
        ("queued", "q"),
        ("started", "p"),
        ("completed", "p"),
        ("started", "q"),
        ("completed", "q"),
    ]
    machines = [e for e in run["events"] if e["event_type"] == "machine.started"]
    assert [event["stage_name"] for event in machines] == ["p", "q"]
    groups = {e["stage_name"]: e["group_id"] for e in run["events"] if e["group_id"]}
    assert groups == {"p": "g0", "q": "g1"}
    assert (run["report"]["kind"], run["report"]["stages"]) == ("pipeline", 2)
    assert run["report"]["output"] == "Finished 1 turns."


def test_a_box_is_given_what_the_one_before_left(door: HttpClient, tmp_path: Path) -> None:
    def spent(output: str) -> int:
        # What q is given is in its prompt, which it counts once for each of its three lines.
        run = door.finish(pipeline(tmp_path, box("p", CLAUDIO_OUTPUT=output), box("q")))
        return int(run["report"]["input_tokens"])

    short, long = ({"status": "ok", "pad": "x" * size} for size in (0, 2000))
    assert spent(json.dumps(long)) - spent(json.dumps(short)) == 3 * 2000 // 4


FAN_OUT: list[dict[str, Any]] = [
    {"type": "box", "name": "p"},
    {"type": "fan_out", "boxes": ["q", "r"]},
]


def test_a_fan_out_runs_its_boxes_at_once_and_the_next_gets_both(
    door: HttpClient, tmp_path: Path
) -> None:
    stages = [*FAN_OUT, {"type": "box", "name": "z"}]
    spec = pipeline(
        tmp_path,
        box("p"),
        box("q", CLAUDIO_DELAY_MS="1500"),
        box("r", CLAUDIO_DELAY_MS="1500"),
        box("z"),
        stages=stages,
    )
    run = door.finish(spec)
    assert run["status"] == "succeeded"
    order = [each for each in stage_events(run) if each[0] in ("started", "completed")]
    assert {order[2], order[3]} == {("started", "q"), ("started", "r")}
    depends = {
        e["stage_name"]: e["payload"]["depends_on"]
        for e in run["events"]
        if e["event_type"] == "stage.queued"
    }
    assert depends == {"p": [], "q": ["p"], "r": ["p"], "z": ["q", "r"]}
    assert run["report"]["stages"] == 4
    manifest = run["artifact_publication"]["manifest"]
    assert sorted(entry["stage"] for entry in manifest) == ["p", "q", "r", "z"]


def test_the_output_of_a_fan_out_at_the_end_is_of_the_box_declared_last(
    door: HttpClient, tmp_path: Path
) -> None:
    # The one declared first is the slower.
    spec = pipeline(
        tmp_path,
        box("p"),
        {**box("q"), "sandbox": {"env": {"CLAUDIO_TURNS": "2", "CLAUDIO_DELAY_MS": "800"}}},
        box("r"),
        stages=FAN_OUT,
    )
    assert door.finish(spec)["report"]["output"] == "Finished 1 turns."


def test_a_box_that_fails_ends_the_pipeline_and_skips_what_had_not_begun(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = pipeline(tmp_path, box("p"), box("q", CLAUDIO_FAIL="broken"), box("r"), box("s"))
    run = door.finish(spec)
    assert run["status"] == "failed"
    assert "broken" in run["error"]
    states = {name: stage["status"] for name, stage in run["stage_states"].items()}
    assert states == {"p": "succeeded", "q": "failed", "r": "skipped", "s": "skipped"}
    assert (run["active_stage_count"], run["active_microvm_count"]) == (0, 0)


def test_boxes_hand_files_on_by_name(door: HttpClient, tmp_path: Path) -> None:
    maker = {
        "name": "maker",
        **scripted(f"echo the plan > output/plan; echo notes > aside/notes; {LEAVE_OUTPUT}"),
        "outputs": [{"name": "plans"}, {"name": "notes", "guest": "/workspace/aside"}],
    }
    reader = {
        "name": "reader",
        **scripted(f"cat input/plan given/notes; {LEAVE_OUTPUT}"),
        "inputs": [{"from": "plans"}, {"from": "notes", "guest": "/workspace/given"}],
    }
    run = door.finish(pipeline(tmp_path, maker, reader))
    assert (run["status"], run["error"]) == ("succeeded", None)
    assert run["report"]["output"] == "the plan\nnotes"


def test_an_input_that_is_nobodys_output_fails_the_pipeline(
    door: HttpClient, tmp_path: Path
) -> None:
    stranger = {**box("reader"), "inputs": [{"from": "nobody"}]}
    broken = door.finish(pipeline(tmp_path, box("maker"), stranger))
    assert broken["status"] == "failed"
    assert "nobody" in broken["error"]


def test_a_box_has_its_own_time(door: HttpClient, tmp_path: Path) -> None:
    slow = {**box("p", CLAUDIO_DELAY_MS="600000"), "timeout_secs": 1}
    run = door.finish(pipeline(tmp_path, slow))
    assert run["status"] == "failed"
    assert "after 1s" in run["error"]


# -- void-control --------------------------------------------------------------------------------


class NotUnderstood(Exception):
    """What the orchestrator can't make sense of."""


@dataclass
class VoidControl:
    """An orchestrator that knows of the API what void-control does (contract 5.5)."""

    api: HttpClient
    seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    STATES: ClassVar = {
        "pending": "pending",
        "starting": "starting",
        "running": "running",
        "succeeded": "succeeded",
        "success": "succeeded",
        "completed": "succeeded",
        "failed": "failed",
        "cancelled": "cancelled",
        "canceled": "cancelled",
    }
    EVENTS = ("run.started", *TERMINAL)

    def start(self, file: Path, text: str) -> str:
        answer = self.api.post("/v1/runs", {"file": str(file), "input": text})
        if answer.status != 200:
            raise NotUnderstood(answer)
        return f"vb:{answer.json['run_id']}"

    def inspect(self, handle: str) -> str:
        run = self.api.get(f"/v1/runs/{handle.removeprefix('vb:')}").json
        return self.STATES[run["status"].lower()]

    def poll(self, handle: str) -> list[str]:
        """New events of the four kinds, by their first names; seq must rise."""
        run_id = handle.removeprefix("vb:")
        seen = self.seen.setdefault(handle, [])
        marker = f"?from_event_id={seen[-1]['event_id']}" if seen else ""
        kept = []
        for event in self.api.get(f"/v1/runs/{run_id}/events{marker}").json:
            if event["event_type"] not in self.EVENTS:
                continue
            if event["run_id"] != run_id or (seen and event["seq"] <= seen[-1]["seq"]):
                raise NotUnderstood(event)
            seen.append(event)
            kept.append(event["event_type"])
        return kept

    def cancel(self, handle: str) -> str:
        """After a cancel the run is looked at again, and must have a last event."""
        run_id = handle.removeprefix("vb:")
        answer = self.api.post(f"/v1/runs/{run_id}/cancel", {"reason": "budget"})
        state = self.STATES[answer.json["state"].lower()]
        events = self.api.get(f"/v1/runs/{run_id}/events").json
        if not [event for event in events if event["event_type"] in TERMINAL]:
            raise NotUnderstood(events)
        return state

    def collect(self, handle: str) -> dict[str, Any]:
        """Structured output, by the manifest; it must have metrics."""
        run_id = handle.removeprefix("vb:")
        manifest = self.api.get(f"/v1/runs/{run_id}").json["artifact_publication"]["manifest"]
        paths = [entry["retrieval_path"] for entry in manifest if entry["name"] == "result.json"]
        paths += [f"/v1/runs/{run_id}/stages/{stage}/output-file" for stage in ("main", "output")]
        for path in paths:
            answer = self.api.get(path)
            if answer.status == 200:
                output: dict[str, Any] = answer.json
                if not isinstance(output["metrics"], dict):
                    raise NotUnderstood(output)
                return output
        raise NotUnderstood(paths)


def test_an_orchestrator_of_void_box_drives_a_run(api: HttpClient, tmp_path: Path) -> None:
    control = VoidControl(api)
    handle = control.start(agent(tmp_path), "look around")
    api.wait_type(handle.removeprefix("vb:"), *TERMINAL)
    assert control.poll(handle) == ["run.started", "run.finished"]
    assert control.poll(handle) == []
    assert control.inspect(handle) == "succeeded"
    assert control.collect(handle)["metrics"]["turns"] == 1


def test_an_orchestrator_of_void_box_collects_a_workflows_output(
    door: HttpClient, tmp_path: Path
) -> None:
    control = VoidControl(door)
    script = structured({"status": "ok", "metrics": {"score": 7}})
    handle = control.start(workflow(tmp_path, step("a", script), output_step="a"), "x")
    door.wait_type(handle.removeprefix("vb:"), *TERMINAL)
    assert control.collect(handle) == {"status": "ok", "metrics": {"score": 7}}


def test_an_orchestrator_of_void_box_cancels_a_run(api: HttpClient, tmp_path: Path) -> None:
    control = VoidControl(api)
    opened = gate(tmp_path)
    handle = control.start(workflow(tmp_path, step("a", opened.wait)), "x")
    assert control.poll(handle) == ["run.started"]
    assert control.cancel(handle) == "cancelled"
    assert control.poll(handle) == ["run.cancelled"]
    assert control.inspect(handle) == "cancelled"


def test_an_orchestrator_of_void_box_is_told_of_output_that_is_none(
    door: HttpClient, tmp_path: Path
) -> None:
    control = VoidControl(door)
    handle = control.start(agent(tmp_path, CLAUDIO_OUTPUT="no json"), "x")
    door.wait_type(handle.removeprefix("vb:"), *TERMINAL)
    assert control.inspect(handle) == "failed"
    with pytest.raises(NotUnderstood):
        control.collect(handle)
