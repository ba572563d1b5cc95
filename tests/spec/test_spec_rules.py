"""Every rule of the run specification, by its message and place."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from voidbus.spec.loader import parse_run_spec
from voidbus.spec.policy import Policy
from voidbus.spec.problem import SpecError

HEAD = "kind: {}\nname: n\n"
AGENT = HEAD.format("agent") + "agent:\n  prompt: p\n"
STEP = "{{name: {}, run: {{program: sh}}, depends_on: [{}]}}"
BOX = "{{name: {}, prompt: p}}"


def workflow(*steps: str, more: str = "") -> str:
    return HEAD.format("workflow") + f"workflow: {{steps: [{', '.join(steps)}]{more}}}"


def pipeline(*boxes: str, more: str = "") -> str:
    return HEAD.format("pipeline") + f"pipeline: {{boxes: [{', '.join(boxes)}]{more}}}"


def errors(text: str) -> list[tuple[str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_run_spec(text, name="x.yaml", format="yaml")
    assert all(problem.line >= 1 and problem.column >= 1 for problem in caught.value.problems)
    return [(problem.field, problem.message) for problem in caught.value.errors]


A, B = STEP.format("a", ""), STEP.format("b", "a")
RULES = {
    "version": (AGENT + "api_version: v2", "api_version", "unsupported api_version"),
    "kind": (HEAD.format("robot"), "kind", "is not one of the values allowed"),
    "no kind": ("name: n", "kind", "is required"),
    "no name": ("kind: sandbox", "name", "is required"),
    "agent section": (HEAD.format("agent"), "kind", "kind=agent requires 'agent' section"),
    "pipeline section": (
        HEAD.format("pipeline"),
        "kind",
        "kind=pipeline requires 'pipeline' section",
    ),
    "workflow section": (
        HEAD.format("workflow"),
        "kind",
        "kind=workflow requires 'workflow' section",
    ),
    "blank prompt": (
        HEAD.format("agent") + "agent: {prompt: '  '}",
        "agent.prompt",
        "agent.prompt cannot be empty",
    ),
    "service timeout": (
        AGENT + "  mode: service\n  output_file: o\n  timeout_secs: 5",
        "agent.timeout_secs",
        "agent: mode: service and timeout_secs are mutually exclusive",
    ),
    "service output": (
        AGENT + "  mode: service",
        "agent.mode",
        "agent: mode: service requires output_file",
    ),
    "service proxy": (
        AGENT
        + "  mode: service\n  output_file: o\nllm: {provider: claude, credential_proxy: true}",
        "llm.credential_proxy",
        "agent: mode: service and llm.credential_proxy are mutually exclusive",
    ),
    "interactive timeout": (
        AGENT + "  mode: interactive\n  timeout_secs: 5",
        "agent.timeout_secs",
        "agent: mode: interactive and timeout_secs are mutually exclusive",
    ),
    "no boxes": (pipeline(), "pipeline.boxes", "pipeline.boxes cannot be empty"),
    "no steps": (workflow(), "workflow.steps", "workflow.steps cannot be empty"),
    "service step": (
        workflow("{name: N, run: {program: sh}, mode: service, timeout_secs: 1}"),
        "workflow.steps[0].timeout_secs",
        "step 'N': mode: service and timeout_secs are mutually exclusive",
    ),
    "sandbox with agent": (
        HEAD.format("sandbox") + "agent: {prompt: p}",
        "agent",
        "kind: sandbox does not accept an agent block",
    ),
    "sandbox with pipeline": (
        pipeline(BOX.format("a")).replace("kind: pipeline", "kind: sandbox"),
        "pipeline",
        "kind: sandbox does not accept a pipeline block",
    ),
    "sandbox with workflow": (
        workflow(A).replace("kind: workflow", "kind: sandbox"),
        "workflow",
        "kind: sandbox does not accept a workflow block",
    ),
    "skill form": (
        AGENT + "  skills: [oops]",
        "agent.skills[0]",
        "invalid skill 'oops', expected '<type>:<value>'",
    ),
    "skill type": (
        AGENT + "  skills: ['cli:a', 'magic:x']",
        "agent.skills[1]",
        "unsupported skill type 'magic'",
    ),
    "provider": (AGENT + "llm: {provider: cluade}", "llm.provider", "unknown provider"),
    "memory low": (AGENT + "sandbox: {memory_mb: 15}", "sandbox.memory_mb", "is out of range"),
    "memory high": (AGENT + "sandbox: {memory_mb: 16385}", "sandbox.memory_mb", "is out of range"),
    "vcpus low": (AGENT + "sandbox: {vcpus: 0}", "sandbox.vcpus", "is out of range"),
    "vcpus high": (AGENT + "sandbox: {vcpus: 257}", "sandbox.vcpus", "is out of range"),
    "words for memory": (
        AGENT + "sandbox: {memory_mb: lots}",
        "sandbox.memory_mb",
        "must be a whole number",
    ),
    "fraction": (AGENT + "sandbox: {vcpus: 1.0}", "sandbox.vcpus", "must be a whole number"),
    "truth for number": (
        AGENT + "sandbox: {vcpus: true}",
        "sandbox.vcpus",
        "must be a whole number",
    ),
    "quoted number": (AGENT + "sandbox: {vcpus: '2'}", "sandbox.vcpus", "must be a whole number"),
    "list for section": (AGENT + "sandbox: [1]", "sandbox", "must be a mapping"),
    "text for list": (AGENT + "  skills: cli:a", "agent.skills", "must be a list"),
    "duplicate step": (workflow(A, A), "workflow.steps[1].name", "duplicate step name 'a'"),
    "duplicate box": (
        pipeline(BOX.format("a"), BOX.format("a")),
        "pipeline.boxes[1].name",
        "duplicate box name 'a'",
    ),
    "dangling dependency": (
        workflow(A, STEP.format("b", "x")),
        "workflow.steps[1].depends_on[0]",
        "Step 'x' not found in workflow",
    ),
    "dangling stdin": (
        workflow("{name: a, run: {program: sh, stdin_from: x}}"),
        "workflow.steps[0].run.stdin_from",
        "Step 'x' not found in workflow",
    ),
    "dangling output": (
        workflow(A, more=", output_step: x"),
        "workflow.output_step",
        "Step 'x' not found in workflow",
    ),
    "cycle": (
        workflow(STEP.format("a", "b"), B),
        "workflow.steps[0].depends_on",
        "Circular dependency detected at step 'a'",
    ),
    "fan_out first": (
        pipeline(BOX.format("a"), more=", stages: [{type: fan_out, boxes: [a]}]"),
        "pipeline.stages[0].type",
        "pipeline first stage cannot be fan_out",
    ),
    "unknown box": (
        pipeline(BOX.format("a"), more=", stages: [{type: box, name: z}]"),
        "pipeline.stages[0].name",
        "unknown box 'z'",
    ),
    "reused box": (
        pipeline(
            BOX.format("a"), more=", stages: [{type: box, name: a}, {type: fan_out, boxes: [a]}]"
        ),
        "pipeline.stages[1].boxes[0]",
        "unknown box 'a': an earlier stage has used it",
    ),
    "stage type": (
        pipeline(BOX.format("a"), more=", stages: [{type: bx, name: a}]"),
        "pipeline.stages[0].type",
        "is not one of the values allowed",
    ),
    "stage field": (
        pipeline(BOX.format("a"), more=", stages: [{type: box}]"),
        "pipeline.stages[0].name",
        "is required",
    ),
    "unknown input": (
        pipeline("{name: a, prompt: p, inputs: [{from: plan}]}"),
        "pipeline.boxes[0].inputs[0].from",
        "unknown output 'plan'",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_told_with_its_field(rule: str) -> None:
    text, field, message = RULES[rule]
    assert (field, message) in errors(text)


def test_every_broken_rule_is_told_at_once() -> None:
    text = AGENT + "  mode: service\n  timeout_secs: 1\nllm: {provider: x}\napi_version: v9"
    assert len(errors(text)) == 4


def test_lm_studio_and_any_case_of_a_provider_are_known() -> None:
    for provider in ("lm-studio", "Claude", "OLLAMA"):
        spec = parse_run_spec(
            AGENT + f"llm: {{provider: {provider}}}", name="x", format="yaml"
        ).spec
        assert spec.llm is not None
        assert spec.llm.provider == provider.lower()


def test_a_policy_has_the_defaults_and_messages_of_the_api() -> None:
    policy = Policy.model_validate({})
    assert policy.model_dump() == {
        "max_parallel_microvms_per_run": 4,
        "max_stage_retries": 3,
        "stage_timeout_secs": 3600,
        "cancel_grace_period_secs": 30,
    }
    for field, message in (
        ("max_parallel_microvms_per_run", "max_parallel_microvms_per_run must be >= 1"),
        ("stage_timeout_secs", "stage_timeout_secs must be > 0"),
    ):
        with pytest.raises(ValidationError) as caught:
            Policy.model_validate({field: 0})
        assert [(e["type"], e["msg"]) for e in caught.value.errors()] == [("policy", message)]
    for wrong in (-1, 1.5, "1", True, 2**64):
        with pytest.raises(ValidationError) as caught:
            Policy.model_validate({"max_stage_retries": wrong})
        assert caught.value.errors()[0]["type"] != "policy"
    assert Policy(max_stage_retries=0, cancel_grace_period_secs=0).max_stage_retries == 0
