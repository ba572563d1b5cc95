"""Workflows by HTTP (contract 3.2), and what a policy holds them to (1.6)."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from api_kit import box, gate, pipeline, step, structured, workflow, write_spec
from http_kit import HttpClient


def kinds(run: dict[str, Any], *wanted: str) -> list[tuple[str, str]]:
    """(what happened, stage) of a run's stage events."""
    return [
        (event["event_type"].removeprefix("stage."), event["stage_name"])
        for event in run["events"]
        if event["event_type"].removeprefix("stage.") in wanted
    ]


def test_a_step_reads_what_the_first_it_depends_on_printed(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path,
        step("one", "echo first"),
        step("two", "echo second"),
        step("join", "cat; echo end", "two", "one"),
    )
    assert door.finish(spec)["report"]["output"] == "second\nend\n"


def test_a_step_may_read_what_another_that_has_finished_printed(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path,
        step("one", "echo first"),
        step("two", "echo second", "one"),
        step("three", "cat", "two", stdin_from="one"),
    )
    assert door.finish(spec)["report"]["output"] == "first\n"


def test_stdin_from_a_step_that_has_not_run_falls_back_to_the_pipe(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path,
        step("one", "echo first"),
        step("two", "cat", "one", stdin_from="late"),
        step("late", "echo late", "two"),
        output_step="two",
    )
    # It leaves no file, and of several steps none is owed.
    assert door.finish(spec)["report"]["output"] == "first\n"


def test_a_step_without_any_input_reads_nothing(door: HttpClient, tmp_path: Path) -> None:
    run = door.finish(workflow(tmp_path, step("a", "cat; echo end")))
    assert run["report"]["output"] == "end\n"


def test_a_level_is_over_before_the_next_begins_and_its_steps_run_at_once(
    door: HttpClient, tmp_path: Path
) -> None:
    left, right = gate(tmp_path), gate(tmp_path)
    # Each waits for the other: one after the other they would wait for ever.
    spec = workflow(
        tmp_path,
        step("left", f"echo > '{right.path}'; {left.wait}"),
        step("right", f"{right.wait}; echo > '{left.path}'"),
        step("end", "true", "left", "right"),
    )
    run = door.finish(spec)
    assert run["status"] == "succeeded"
    order = kinds(run, "started", "completed")
    assert set(order[:2]) == {("started", "left"), ("started", "right")}
    assert order[4:] == [("started", "end"), ("completed", "end")]
    groups = {e["stage_name"]: e["group_id"] for e in run["events"] if e["group_id"]}
    assert groups == {"left": "g0", "right": "g0", "end": "g1"}


def test_a_failure_skips_what_depends_on_it_and_nothing_else(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path,
        step("bad", "exit 9"),
        step("good", "true"),
        step("after", "true", "bad"),
        step("later", "true", "after"),
        step("other", "echo fine", "good"),
        output_step="other",
    )
    run = door.finish(spec)
    assert run["status"] == "succeeded"
    states = {name: stage["status"] for name, stage in run["stage_states"].items()}
    assert states == {
        "bad": "failed",
        "good": "succeeded",
        "after": "skipped",
        "later": "skipped",
        "other": "succeeded",
    }
    reasons = {
        event["stage_name"]: event["payload"]["reason"]
        for event in run["events"]
        if event["event_type"] == "stage.skipped"
    }
    assert reasons == {
        "after": 'dependency "bad" failed',
        "later": 'dependency "after" failed',
    }
    # Skipped steps are counted too.
    assert run["report"]["stages"] == 5


def test_a_run_succeeds_as_its_output_step_does(door: HttpClient, tmp_path: Path) -> None:
    steps = (step("good", "echo fine"), step("bad", "exit 1", "good"))
    assert door.finish(workflow(tmp_path, *steps, output_step="good"))["status"] == "succeeded"
    run = door.finish(workflow(tmp_path, *steps, output_step="bad"))
    assert run["status"] == "failed"
    assert run["report"]["success"] is False
    # Without a name it is the only step nothing depends on.
    assert door.finish(workflow(tmp_path, *steps))["status"] == "failed"


def test_an_output_step_that_was_skipped_fails_the_run(door: HttpClient, tmp_path: Path) -> None:
    spec = workflow(tmp_path, step("bad", "false"), step("out", "echo x", "bad"))
    run = door.finish(spec)
    assert (run["status"], run["report"]["output"]) == ("failed", "")


def test_an_output_step_nobody_knows_fails_the_run(door: HttpClient, tmp_path: Path) -> None:
    run = door.finish(workflow(tmp_path, step("a", "true"), output_step="nobody"))
    assert run["status"] == "failed"
    assert "nobody" in run["error"]


def test_the_input_is_put_before_the_output_and_no_step_reads_it(
    door: HttpClient, tmp_path: Path
) -> None:
    run = door.finish(workflow(tmp_path, step("a", "cat; echo out")), input="in")
    assert run["report"]["output"] == "in\nout\n"


def test_steps_share_a_machine_and_start_in_the_workspace(door: HttpClient, tmp_path: Path) -> None:
    spec = workflow(
        tmp_path,
        step("write", "echo kept > note; test -e note"),
        step("read", "cat note; echo $WORD", "write"),
        sandbox={"mode": "mock", "env": {"WORD": "given"}},
    )
    run = door.finish(spec)
    assert run["report"]["output"] == "kept\ngiven\n"
    assert [event["event_type"] for event in run["events"]].count("machine.started") == 1


def test_a_program_that_is_not_there_fails_its_step(door: HttpClient, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        "workflow",
        workflow={"steps": [{"name": "a", "run": {"program": "no-such-program"}}]},
    )
    run = door.finish(spec)
    assert run["status"] == "failed"
    assert "no-such-program" in run["error"]


# -- policies ------------------------------------------------------------------------------------


def test_a_step_is_ended_when_its_time_is_over(door: HttpClient, tmp_path: Path) -> None:
    slow = step("slow", "echo up; sleep 600")
    by_policy = door.finish(
        workflow(tmp_path, slow), policy={"stage_timeout_secs": 1, "max_stage_retries": 0}
    )
    by_step = door.finish(workflow(tmp_path, {**slow, "timeout_secs": 1}))
    for run in (by_policy, by_step):
        assert run["status"] == "failed"
        (failed,) = [e for e in run["events"] if e["event_type"] == "stage.failed"]
        assert 1000 <= failed["payload"]["duration_ms"] < 20000
        assert "after 1s" in failed["payload"]["error"]


def test_a_steps_own_time_stands_over_the_policys(door: HttpClient, tmp_path: Path) -> None:
    spec = workflow(tmp_path, step("a", "sleep 1.5", timeout_secs=30))
    assert door.finish(spec, policy={"stage_timeout_secs": 1})["status"] == "succeeded"


def test_a_step_in_service_mode_has_all_the_time(door: HttpClient, tmp_path: Path) -> None:
    spec = workflow(tmp_path, step("a", "sleep 1.5", mode="service"))
    assert door.finish(spec, policy={"stage_timeout_secs": 1})["status"] == "succeeded"


def test_a_step_is_tried_as_often_as_the_policy_says_and_no_more(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(tmp_path, step("a", "exit 4"), step("b", "true", "a"))
    for retries in (0, 2):
        run = door.finish(spec, policy={"max_stage_retries": retries})
        attempts = [
            e["payload"]["stage_attempt"]
            for e in run["events"]
            if e["event_type"] == "stage.failed"
        ]
        assert attempts == list(range(1, retries + 2))
        assert kinds(run, "skipped") == [("skipped", "b")]


def test_without_a_policy_nothing_is_tried_again(door: HttpClient, tmp_path: Path) -> None:
    run = door.finish(workflow(tmp_path, step("a", "false")))
    assert kinds(run, "started") == [("started", "a")]


def test_only_the_output_of_the_attempt_that_counts_is_handed_on(
    door: HttpClient, tmp_path: Path
) -> None:
    spec = workflow(
        tmp_path,
        step("a", "echo try >> tries; wc -l < tries; test $(wc -l < tries) -ge 2"),
        step("b", "cat", "a"),
    )
    run = door.finish(spec, policy={"max_stage_retries": 3})
    assert run["report"]["output"].split() == ["2"]


def test_counts_are_true_at_every_event_and_never_over_the_cap(
    door: HttpClient, tmp_path: Path
) -> None:
    """Six steps at once with room for two; a follower looks at the run at each event."""
    steps = [step(f"s{number}", "sleep 0.2") for number in range(6)]
    run_id = door.start(workflow(tmp_path, *steps), policy={"max_parallel_microvms_per_run": 2})
    seen: list[tuple[int, int]] = []
    with door.stream(run_id) as stream, door.open() as connection:
        for _ in stream:
            run = door.ask("GET", f"/v1/runs/{run_id}", connection=connection).json
            seen.append((run["active_stage_count"], run["active_microvm_count"]))
    assert max(stages for stages, _ in seen) == 2
    assert {machines for _, machines in seen} <= {0, 1}
    assert seen[-1] == (0, 0)
    # As the events tell it: no more than two run at any time.
    running, most = 0, 0
    for kind, _ in kinds(door.run(run_id), "started", "completed"):
        running += 1 if kind == "started" else -1
        most = max(most, running)
    assert most == 2


def test_a_pipeline_has_no_more_machines_than_its_policy_allows(
    door: HttpClient, tmp_path: Path
) -> None:
    names = ["b", "c", "d"]
    spec = pipeline(
        tmp_path,
        box("a"),
        *(box(name, CLAUDIO_DELAY_MS="300") for name in names),
        stages=[{"type": "box", "name": "a"}, {"type": "fan_out", "boxes": names}],
    )
    run_id = door.start(spec, policy={"max_parallel_microvms_per_run": 1})
    seen: list[tuple[int, int]] = []
    with door.stream(run_id) as stream, door.open() as connection:
        for _ in stream:
            run = door.ask("GET", f"/v1/runs/{run_id}", connection=connection).json
            seen.append((run["active_stage_count"], run["active_microvm_count"]))
    assert door.run(run_id)["status"] == "succeeded"
    assert max(stages for stages, _ in seen) == 1
    assert max(machines for _, machines in seen) == 1
    assert seen[-1] == (0, 0)


# -- sandbox -------------------------------------------------------------------------------------


def test_a_sandbox_stays_up_until_it_is_cancelled(door: HttpClient, tmp_path: Path) -> None:
    run_id = door.start(write_spec(tmp_path, "sandbox"))
    door.wait_type(run_id, "sandbox.ready")
    run = door.run(run_id)
    assert (run["status"], run["active_microvm_count"]) == ("running", 1)
    assert door.post(f"/v1/runs/{run_id}/cancel").json["state"] == "cancelled"
    assert door.run(run_id)["active_microvm_count"] == 0


def test_runs_at_once_do_not_mix(door: HttpClient, tmp_path: Path) -> None:
    def one(number: int) -> None:
        result = structured({"status": "ok", "number": number})
        spec = workflow(tmp_path, step("a", f"{result}; echo {number}"), output_step="a")
        run = door.finish(spec)
        outputs[number] = run["report"]["output"].split()[-1]
        path = run["artifact_publication"]["manifest"][0]["retrieval_path"]
        documents[number] = json.loads(door.get(path).body)["number"]

    outputs: dict[int, str] = {}
    documents: dict[int, int] = {}
    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {number: str(number) for number in range(8)}
    assert documents == {number: number for number in range(8)}
