"""Pipelines: boxes in stages, what they hand on, and what a failure ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conductor_kit import FakeConductor

from voidbus.actors.workloads.make import box_sandbox, make_workload
from voidbus.spec.policy import Policy
from voidbus.spec.run import BoxSpec, RunSpec, SandboxSpec

OUTPUT = "/workspace/output.json"


def result(text: str, **fields: Any) -> bytes:
    event = {
        "type": "result",
        "result": text,
        "total_cost_usd": 0.5,
        "usage": {"input_tokens": 10, "output_tokens": 1},
        **fields,
    }
    return json.dumps(event).encode() + b"\n"


def box(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "prompt": f"be {name}", **fields}


def begin(
    *boxes: dict[str, Any],
    stages: list[dict[str, Any]] | None = None,
    input_text: str | None = None,
    retries: int = 0,
    patient: bool = False,
) -> FakeConductor:
    conductor = FakeConductor(patient=patient)
    spec = {
        "kind": "pipeline",
        "name": "line",
        "sandbox": {"memory_mb": 512, "env": {"A": "run", "B": "run"}},
        "pipeline": {"boxes": boxes, "stages": stages or []},
    }
    workload = make_workload(
        RunSpec.model_validate(spec),
        conductor,
        run_id="r1",
        host_env={},
        input_text=input_text,
        policy=Policy(max_stage_retries=retries),
    )
    workload.begin()
    conductor.settle()
    return conductor


FAN: list[dict[str, Any]] = [
    {"type": "box", "name": "first"},
    {"type": "fan_out", "boxes": ["left", "right"]},
    {"type": "box", "name": "last"},
]
BOXES = (box("first"), box("left"), box("right"), box("last"))


def prompt_of(conductor: FakeConductor, name: str) -> str:
    args = conductor.commands[name].args
    return args[args.index("-p") + 1]


def test_boxes_are_queued_behind_the_stage_before_and_run_in_order() -> None:
    conductor = begin(*BOXES, stages=FAN)
    queued = [e for e in conductor.events if e.event_type == "stage.queued"]
    assert [(e.stage, e.box, e.group, e.payload["depends_on"]) for e in queued] == [
        ("first", "first", "g0", []),
        ("left", "left", "g1", ["first"]),
        ("right", "right", "g1", ["first"]),
        ("last", "last", "g2", ["left", "right"]),
    ]
    assert conductor.stages_running() == ["first"]
    conductor.end("first", stdout=result("one"))
    assert conductor.stages_running() == ["left", "right"]
    conductor.end("right", stdout=result("R"))
    conductor.end("left", stdout=result("L"))
    assert conductor.stages_running() == ["last"]


def test_without_stages_each_box_is_one_in_the_order_declared() -> None:
    conductor = begin(box("one"), box("two"))
    assert conductor.stages_running() == ["one"]
    conductor.end("one", stdout=result("x"))
    assert conductor.stages_running() == ["two"]


def test_every_box_has_a_machine_of_its_own_which_is_stopped_after_it() -> None:
    conductor = begin(box("one"), box("two", sandbox={"memory_mb": 1024, "env": {"B": "box"}}))
    conductor.end("one", stdout=result("x"))
    assert [opened.request.stage for opened in conductor.machines] == ["one", "two"]
    assert [opened.closed for opened in conductor.machines] == [True, False]
    assert [opened.request.sandbox.memory_mb for opened in conductor.machines] == [512, 1024]
    assert conductor.commands["one"].env.items() >= {"A": "run", "B": "run"}.items()
    assert conductor.commands["two"].env.items() >= {"A": "run", "B": "box"}.items()


def test_a_box_hands_on_its_output_file_else_its_words_else_nothing() -> None:
    conductor = begin(box("one"), box("two"), box("three"), box("four"))
    conductor.files[OUTPUT] = b'{"status": "ok"}'
    conductor.end("one", stdout=result("words"))
    assert conductor.written["/workspace/input.json"] == b'{"status": "ok"}'
    del conductor.files[OUTPUT]
    conductor.end("two", stdout=result("words"))
    assert conductor.written["/workspace/input.json"] == b"words"
    assert "--- Previous stage output ---\nwords\n---" in prompt_of(conductor, "three")
    conductor.end("three", stdout=result(""))
    assert "Previous stage output" not in prompt_of(conductor, "four")


def test_a_fan_out_hands_on_its_boxes_words_in_the_order_declared() -> None:
    conductor = begin(*BOXES, stages=FAN)
    conductor.end("first", stdout=result("both get this"))
    for side in ("left", "right"):
        assert "both get this" in prompt_of(conductor, side)
    conductor.end("right", stdout=result("R"))
    conductor.end("left", stdout=result("L"))
    assert conductor.written["/workspace/input.json"] == b'["L", "R"]'


def test_the_runs_input_is_the_first_stages() -> None:
    conductor = begin(box("one"), input_text="given")
    assert conductor.written["/workspace/input.json"] == b"given"


def test_the_report_sums_up_and_its_output_is_the_last_box_declared() -> None:
    conductor = begin(*BOXES[:3], stages=FAN[:2])
    for name in ("first", "right", "left"):
        conductor.end(name, stdout=result(name))
    report = conductor.verdict.report
    assert report is not None
    assert (report.kind, report.name, report.success, report.stages) == (
        "pipeline",
        "line",
        True,
        3,
    )
    assert report.output == "right"
    assert (report.input_tokens, report.output_tokens, report.total_cost_usd) == (30, 3, 1.5)
    assert conductor.verdict.requires_output


def test_each_box_leaves_its_output_before_its_machine_is_gone() -> None:
    conductor = begin(box("one"), box("two"))
    conductor.files[OUTPUT] = b'{"status": "ok"}'
    conductor.end("one", stdout=result("x"))
    conductor.end("two", stdout=result("y"))
    assert [(kept.stage, kept.name) for kept in conductor.stored] == [("one", ""), ("two", "")]
    assert [output.stage for output in conductor.outputs] == ["one", "two"]


def test_a_failure_ends_the_pipeline_and_skips_what_had_not_begun() -> None:
    conductor = begin(*BOXES, stages=FAN)
    conductor.end("first", stdout=result("no", is_error=True))
    assert conductor.verdict.error == "box first failed: no"
    assert conductor.types("left")[-1] == "stage.skipped"
    assert conductor.event("stage.skipped", "last").payload["reason"] == 'box "first" failed'
    assert conductor.open_stages() == []
    assert all(opened.closed for opened in conductor.machines)


def test_a_box_of_a_fan_out_that_fails_lets_the_others_finish_first() -> None:
    conductor = begin(*BOXES, stages=FAN)
    conductor.end("first", stdout=result("x"))
    conductor.end("left", 1)
    assert conductor.verdicts == []
    conductor.end("right", stdout=result("R"))
    assert conductor.verdict.error is not None
    assert conductor.verdict.error.startswith("box left failed: ")
    assert conductor.types("right")[-1] == "stage.completed"


def test_a_box_is_tried_again_in_a_new_machine_and_all_it_cost_counts() -> None:
    conductor = begin(box("one"), retries=1)
    conductor.end("one", stdout=result("no", is_error=True))
    conductor.pass_time()
    conductor.end("one", stdout=result("yes"))
    assert [opened.closed for opened in conductor.machines] == [True, True]
    assert conductor.event("stage.completed").payload["stage_attempt"] == 2
    report = conductor.verdict.report
    assert report is not None
    assert (report.success, report.input_tokens) == (True, 20)


def test_a_machine_that_does_not_start_fails_its_box_or_is_tried_again() -> None:
    conductor = begin(box("one"), retries=1, patient=True)
    conductor.machines[0].on_lost("the machine did not start: no memory")
    assert conductor.event("stage.failed").payload["error"] == (
        "the machine did not start: no memory"
    )
    conductor.pass_time()
    conductor.machines[1].on_lost("the machine did not start: no memory")
    assert conductor.verdict.error == "box one failed: the machine did not start: no memory"


def test_outputs_and_inputs_are_directories_boxes_share_by_name() -> None:
    writer = box("writer", outputs=[{"name": "plan"}, {"name": "more", "guest": "/workspace/m"}])
    reader = box("reader", inputs=[{"from": "plan"}])
    conductor = begin(writer, reader)
    conductor.end("writer", stdout=result("x"))
    first, second = (opened.request.shares for opened in conductor.machines)
    assert [(share.guest, share.writable) for share in first] == [
        ("/workspace/output", True),
        ("/workspace/m", True),
    ]
    assert [(share.guest, share.writable) for share in second] == [("/workspace/input", False)]
    assert second[0].name == first[0].name != first[1].name


@pytest.mark.parametrize(("own", "policy", "expected"), [(None, 90, 90), (7, 90, 7), (0, 90, 0)])
def test_a_boxs_own_timeout_comes_before_the_policys(
    own: int | None, policy: int, expected: int
) -> None:
    conductor = FakeConductor()
    spec = {
        "kind": "pipeline",
        "name": "line",
        "pipeline": {"boxes": [box("one", timeout_secs=own)]},
    }
    make_workload(
        RunSpec.model_validate(spec),
        conductor,
        run_id="r1",
        host_env={},
        input_text=None,
        policy=Policy(stage_timeout_secs=policy),
    ).begin()
    conductor.settle()
    assert conductor.commands["one"].timeout == expected


def test_a_box_says_only_what_differs_from_the_runs_machine() -> None:
    run = SandboxSpec(memory_mb=512, network=True, image="x")
    own = BoxSpec.model_validate(box("b", sandbox={"vcpus": 2, "network": False}))
    merged = box_sandbox(run, own)
    assert (merged.memory_mb, merged.vcpus, merged.network, merged.image) == (512, 2, False, "x")
