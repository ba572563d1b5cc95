"""Workflows: levels, pipes, what a failure skips, and what the run comes to."""

from __future__ import annotations

from typing import Any

import pytest
from conductor_kit import FakeConductor
from hypothesis import given, settings
from hypothesis import strategies as st

from voidbus.actors.workloads import workflow as workflow_module
from voidbus.actors.workloads.conductor import OUTPUT_LIMIT, REPORT_LIMIT, MachineRequest
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.workflow import Workflow
from voidbus.spec.run import SandboxSpec, WorkflowSpec


def step(name: str, *depends_on: str, **fields: Any) -> dict[str, Any]:
    run = {"program": "prog", "args": [name], "stdin_from": fields.pop("stdin_from", None)}
    return {"name": name, "run": run, "depends_on": depends_on, **fields}


def begin(
    *steps: dict[str, Any],
    output_step: str | None = None,
    input_text: str | None = None,
    stage_timeout: int | None = None,
    **fields: int,
) -> tuple[FakeConductor, Workflow]:
    conductor = FakeConductor()
    workflow = Workflow(
        "flow",
        WorkflowSpec.model_validate({"steps": steps, "output_step": output_step}),
        conductor,
        machine=MachineRequest(SandboxSpec()),
        outputs=OutputCollector(conductor, "r1"),
        env={"A": "b"},
        input_text=input_text,
        stage_timeout=stage_timeout,
        **fields,
    )
    workflow.begin()
    return conductor, workflow


DIAMOND = (step("a"), step("b", "a"), step("c", "a"), step("d", "c", "b"))


def test_every_step_is_queued_first_with_its_dependencies_and_its_level() -> None:
    conductor, _ = begin(*DIAMOND)
    queued = [e for e in conductor.events if e.event_type == "stage.queued"]
    assert conductor.types()[:4] == ["stage.queued"] * 4
    assert [(e.stage, e.group, e.payload) for e in queued] == [
        ("a", "g0", {"depends_on": []}),
        ("b", "g1", {"depends_on": ["a"]}),
        ("c", "g1", {"depends_on": ["a"]}),
        ("d", "g2", {"depends_on": ["c", "b"]}),
    ]
    assert all(e.box is None for e in conductor.events), "steps have no box"


def test_a_level_runs_at_once_and_whole_before_the_next() -> None:
    conductor, _ = begin(*DIAMOND)
    assert conductor.stages_running() == ["a"]
    conductor.end("a")
    assert conductor.stages_running() == ["b", "c"]
    conductor.end("c")
    assert conductor.stages_running() == ["b"]
    conductor.end("b")
    assert conductor.stages_running() == ["d"]
    conductor.end("d")
    assert conductor.verdict.success


def test_a_step_without_dependencies_runs_in_the_first_level_wherever_it_stands() -> None:
    conductor, _ = begin(step("a"), step("b", "a"), step("alone"))
    assert conductor.stages_running() == ["a", "alone"]


def test_stdin_is_the_output_of_the_first_declared_dependency() -> None:
    conductor, _ = begin(*DIAMOND)
    assert conductor.commands["a"].stdin == b""
    conductor.end("a", stdout=b"from a")
    assert conductor.commands["b"].stdin == b"from a"
    conductor.end("b", stdout=b"from b")
    conductor.end("c", stdout=b"from c", stderr=b"not this")
    assert conductor.commands["d"].stdin == b"from c"


def test_stdin_from_names_another_step_and_does_not_order() -> None:
    conductor, _ = begin(step("a"), step("b", "a"), step("c", "b", stdin_from="a"))
    conductor.end("a", stdout=b"from a")
    conductor.end("b", stdout=b"from b")
    assert conductor.commands["c"].stdin == b"from a"


def test_stdin_from_a_step_that_has_not_finished_falls_back_to_the_pipe() -> None:
    conductor, _ = begin(step("a"), step("late", "a"), step("c", "a", stdin_from="late"))
    conductor.end("a", stdout=b"from a")
    assert conductor.commands["c"].stdin == b"from a"


def test_the_command_is_the_steps_with_the_runs_environment() -> None:
    conductor, _ = begin(step("a"))
    command = conductor.commands["a"]
    assert (command.program, command.args, command.env) == ("prog", ("a",), {"A": "b"})


@pytest.mark.parametrize(
    ("fields", "policy", "expected"),
    [
        ({}, None, 1200),
        ({}, 77, 77),
        ({"timeout_secs": 5}, 77, 5),
        ({"timeout_secs": 0}, 77, 0),
        ({"mode": "service"}, 77, 0),
    ],
)
def test_a_steps_own_timeout_comes_before_the_policys_and_that_before_1200(
    fields: dict[str, Any], policy: int | None, expected: int
) -> None:
    conductor, _ = begin(step("a", **fields), stage_timeout=policy)
    assert conductor.commands["a"].timeout == expected


def test_a_completed_step_says_how_long_it_took() -> None:
    conductor, _ = begin(step("a"))
    conductor.end("a", duration_ms=42)
    done = conductor.event("stage.completed")
    assert (done.stage, done.group, done.level) == ("a", "g0", "info")
    assert done.payload == {"duration_ms": 42, "exit_code": 0, "stage_attempt": 1}


def test_a_failed_step_says_why_and_skips_what_depends_on_it() -> None:
    conductor, _ = begin(step("a"), step("b", "a"), step("c", "b"), step("other"))
    conductor.end("a", 3, stderr=b"no such thing\n")
    failed = conductor.event("stage.failed")
    assert failed.level == "error"
    assert failed.payload["error"] == "Command failed with exit code 3: no such thing"
    conductor.end("other")
    assert conductor.event("stage.skipped", "b").payload["reason"] == 'dependency "a" failed'
    assert conductor.event("stage.skipped", "c").payload["reason"] == 'dependency "b" failed'
    assert conductor.event("stage.skipped", "b").level == "warn"
    assert conductor.types("b") == ["stage.queued", "stage.skipped"]


def test_independent_branches_go_on_after_a_failure() -> None:
    conductor, _ = begin(step("a"), step("b"), step("c", "b"))
    conductor.end("a", 1)
    conductor.end("b")
    assert conductor.stages_running() == ["c"]


def test_only_the_output_step_decides_success() -> None:
    conductor, _ = begin(step("bad"), step("good"), output_step="good")
    conductor.end("bad", 1)
    conductor.end("good", stdout=b"fine\n")
    assert conductor.verdict.success
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "fine\n"
    assert conductor.verdict.report.stages == 2


def test_the_run_fails_with_its_output_step_and_says_so() -> None:
    conductor, _ = begin(step("a"), step("b", "a"))
    conductor.end("a")
    conductor.end("b", -1, error="Process killed after 5s timeout")
    verdict = conductor.verdict
    assert not verdict.success
    assert verdict.error == ("output step b did not succeed: Process killed after 5s timeout")
    assert verdict.exit_code == -1
    assert verdict.report is not None
    assert not verdict.report.success


def test_a_skipped_output_step_fails_the_run() -> None:
    conductor, _ = begin(step("a"), step("b", "a"))
    conductor.end("a", 1)
    assert conductor.verdict.error is not None
    assert "skipped" in conductor.verdict.error
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.stages == 2, "a skipped step counts too"


def test_an_exit_code_of_zero_with_an_error_is_a_failure() -> None:
    conductor, _ = begin(step("a"))
    conductor.end("a", 0, error="the guest closed the connection")
    assert conductor.types("a")[-1] == "stage.failed"
    assert not conductor.verdict.success


def test_the_output_step_is_the_only_sink_else_the_last_in_order() -> None:
    conductor, _ = begin(*DIAMOND)
    for name in "abcd":
        conductor.end(name, stdout=name.encode())
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "d"
    conductor, _ = begin(step("x"), step("y"))
    conductor.end("y", stdout=b"y")
    conductor.end("x", stdout=b"x")
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "y"


def test_input_stands_before_the_output_and_is_not_fed_to_steps() -> None:
    conductor, _ = begin(step("a"), input_text="the input")
    assert conductor.commands["a"].stdin == b""
    conductor.end("a", stdout=b"out")
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "the input\nout"


def test_a_cancel_ends_started_stages_and_skips_queued_ones() -> None:
    conductor, _ = begin(step("a"), step("bad"), step("b", "bad"), step("c", "a"))
    assert conductor.open_stages() == [
        ("a", "started"),
        ("bad", "started"),
        ("b", "queued"),
        ("c", "queued"),
    ]
    conductor.end("bad", 1)
    conductor.end("a")
    assert conductor.open_stages() == [("c", "started")]
    conductor.end("c")
    assert conductor.open_stages() == []


def test_output_is_logged_as_it_comes() -> None:
    conductor, _ = begin(step("a"))
    conductor.end("a", stdout=b"out", stderr=b"err")
    assert conductor.logged == [("a", "stdout", b"out"), ("a", "stderr", b"err")]


def test_a_flood_is_cut_for_pipes_and_report_and_the_cut_is_told() -> None:
    conductor, _ = begin(step("a"), step("b", "a"), output_step="a")
    conductor.end("a", stdout=b"\xff" * (OUTPUT_LIMIT + 1))
    assert len(conductor.commands["b"].stdin) == OUTPUT_LIMIT
    assert conductor.event("output.cut").stage == "a"
    conductor.end("b")
    assert conductor.verdict.report is not None
    assert len(conductor.verdict.report.output.encode()) <= REPORT_LIMIT


def test_output_of_exactly_the_limit_is_not_cut() -> None:
    conductor, _ = begin(step("a"))
    conductor.end("a", stdout=b"x" * OUTPUT_LIMIT)
    assert "output.cut" not in conductor.types()


def test_the_guests_own_words_in_an_error_are_bounded() -> None:
    conductor, _ = begin(step("a"))
    conductor.end("a", 1, error="x" * 1_000_000)
    assert len(conductor.event("stage.failed").payload["error"]) <= 4000


def test_output_is_kept_only_as_long_as_a_step_may_read_it() -> None:
    conductor, workflow = begin(
        step("a"), step("b", "a"), step("c", "b", stdin_from="a"), step("d", "c")
    )

    def held() -> int:
        return workflow_module.HELD_LIMIT - workflow._budget.left

    conductor.end("a", stdout=b"a" * 1000)
    assert held() == 1000, "c will read it"
    conductor.end("b", stdout=b"b" * 100)
    assert held() == 0, "c was given what it reads"
    conductor.end("c", stdout=b"c" * 10)
    conductor.end("d", stdout=b"d")
    assert conductor.commands["c"].stdin == b"a" * 1000
    assert held() == 1


def test_all_steps_together_hold_a_bounded_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow_module, "HELD_LIMIT", 2500)
    conductor, _ = begin(*(step(n) for n in "abc"), *(step("r" + n, n) for n in "abc"))
    for name in "abc":
        conductor.end(name, stdout=name.encode() * 1000)
    assert conductor.commands["rb"].stdin == b"b" * 1000
    assert conductor.commands["rc"].stdin == b"c" * 500
    assert conductor.event("output.cut").stage == "c"


def test_a_level_wider_than_a_guest_takes_is_started_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workflow_module, "STEPS_AT_ONCE", 2)
    conductor, _ = begin(*(step(name) for name in "abcd"), step("e", "a"))
    assert conductor.stages_running() == ["a", "b"]
    conductor.end("b")
    assert conductor.stages_running() == ["a", "c"]
    assert conductor.open_stages() == [
        ("a", "started"),
        ("c", "started"),
        ("d", "queued"),
        ("e", "queued"),
    ]
    for name in "acd":
        conductor.end(name)
    assert conductor.stages_running() == ["e"]
    conductor.end("e")
    assert conductor.verdict.success


# -- the run's policy --------------------------------------------------------------------------


def test_a_failed_step_is_tried_again_as_often_as_the_policy_says_ever_later() -> None:
    conductor, _ = begin(step("a"), step("b", "a"), retries=2)
    conductor.end("a", 1, stdout=b"one")
    assert conductor.stages_running() == [], "it waits before it is tried again"
    conductor.pass_time()
    conductor.end("a", 1, stdout=b"two")
    conductor.pass_time()
    conductor.end("a", 0, stdout=b"three")
    assert conductor.delays == [0.1, 0.2]
    attempts = [(e.event_type, e.payload["stage_attempt"]) for e in conductor.events[2:8]]
    assert attempts == [
        ("stage.started", 1),
        ("stage.failed", 1),
        ("stage.started", 2),
        ("stage.failed", 2),
        ("stage.started", 3),
        ("stage.completed", 3),
    ]
    assert conductor.commands["b"].stdin == b"three", "of the attempt that succeeded"


def test_a_step_that_fails_for_good_skips_what_depends_on_it_only_then() -> None:
    conductor, _ = begin(step("a"), step("b", "a"), retries=1)
    conductor.end("a", 1)
    assert conductor.types("b") == ["stage.queued"]
    conductor.pass_time()
    conductor.end("a", 1)
    assert conductor.types("b") == ["stage.queued", "stage.skipped"]
    assert conductor.verdict.error is not None


def test_no_more_steps_run_at_once_than_the_policy_says() -> None:
    conductor, _ = begin(*(step(name) for name in "abc"), at_once=2)
    assert conductor.stages_running() == ["a", "b"]
    conductor.end("a")
    assert conductor.stages_running() == ["b", "c"]


# -- what it leaves ----------------------------------------------------------------------------


def test_the_result_file_is_the_output_steps_and_mains() -> None:
    conductor, _ = begin(step("a"), step("b", "a"))
    conductor.files["/workspace/result.json"] = b'{"status": "ok"}'
    conductor.end("a")
    conductor.end("b")
    assert [(kept.stage, kept.name) for kept in conductor.stored] == [("b", ""), ("main", "")]
    (output,) = conductor.outputs
    assert (output.stage, output.fault) == ("b", None)


def test_only_one_step_with_a_named_output_owes_structured_output() -> None:
    conductor, _ = begin(step("a"), output_step="a")
    conductor.end("a")
    assert conductor.verdict.requires_output
    conductor, _ = begin(step("a"))
    conductor.end("a")
    assert not conductor.verdict.requires_output
    conductor, _ = begin(step("a"), step("b", "a"), output_step="b")
    conductor.end("a")
    conductor.end("b")
    assert not conductor.verdict.requires_output


# -- random workflows --------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Steps that depend on others in an order that has no cycle, declared in any order."""
    names = [f"s{n}" for n in range(draw(st.integers(1, 8)))]
    steps = []
    for index, name in enumerate(names):
        needs = draw(st.lists(st.sampled_from(names[:index]), unique=True)) if index else []
        stdin_from = draw(st.sampled_from([None, *names[:index]]))
        steps.append(step(name, *needs, stdin_from=stdin_from))
    return draw(st.permutations(steps))


@settings(max_examples=150, deadline=None)
@given(graph=graphs(), data=st.data())
def test_any_workflow_ends_every_step_once_and_by_the_rules(
    graph: list[dict[str, Any]], data: st.DataObject
) -> None:
    conductor, _ = begin(*graph)
    exits: dict[str, int] = {}
    while conductor.running:
        name = data.draw(st.sampled_from(conductor.stages_running()))
        exits[name] = data.draw(st.sampled_from([0, 0, 0, 1]))
        conductor.end(name, exits[name], stdout=name.encode())
    needs = {s["name"]: s["depends_on"] for s in graph}
    order = [e.event_type + " " + str(e.stage) for e in conductor.events]
    ends: dict[str, str] = {}
    for name in needs:
        own = conductor.types(name)
        ended = [t for t in own if t in ("stage.completed", "stage.failed", "stage.skipped")]
        assert len(ended) == 1, own
        assert own[0] == "stage.queued"
        assert own.count("stage.started") == (ended[0] != "stage.skipped")
        ends[name] = ended[0]
    for name, depends_on in needs.items():
        broken = any(ends[d] != "stage.completed" for d in depends_on)
        assert (ends[name] == "stage.skipped") == broken
        if name in exits:
            assert ends[name] == ("stage.failed" if exits[name] else "stage.completed")
            for dependency in depends_on:
                done = order.index(f"stage.completed {dependency}")
                assert done < order.index(f"stage.started {name}")
            if (
                depends_on
                and next(s for s in graph if s["name"] == name)["run"]["stdin_from"] is None
            ):
                assert conductor.commands[name].stdin == depends_on[0].encode()
    levels = {e.stage: int(str(e.group)[1:]) for e in conductor.events if e.group}
    started = [levels[e.stage] for e in conductor.events if e.event_type == "stage.started"]
    assert started == sorted(started), "a level starts when the one before is over"
    assert conductor.open_stages() == []
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.stages == len(graph)
