"""The rules between the fields of a run specification: what a model's types can't say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from voidbus.spec.levels import CircularDependency, UnknownStep, dependency_levels
from voidbus.spec.problem import Level, Location, nearest
from voidbus.spec.run import (
    MOUNT_MODES,
    PROVIDERS,
    SANDBOX_MODES,
    AgentSpec,
    BoxSpec,
    FanOutStage,
    LlmSpec,
    MountSpec,
    PipelineSpec,
    RunSpec,
    StepSpec,
    WorkflowSpec,
)

_SECTIONS = {"agent": "an agent", "pipeline": "a pipeline", "workflow": "a workflow"}

# Names a misspelling is compared with: each comparison costs, and the list may be thousands long.
_MAX_COMPARED = 100


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """A rule a specification breaks, and the field that breaks it."""

    location: Location
    message: str
    found: str | None = None
    allowed: str | None = None
    suggestion: str | None = None
    level: Level = "error"


def broken_rules(spec: RunSpec) -> Iterator[BrokenRule]:
    """Every rule `spec` breaks, in the order of its fields."""
    if spec.api_version != "v1":
        yield BrokenRule(
            ("api_version",), "unsupported api_version", _quoted(spec.api_version), "v1"
        )
    yield from _blank(("name",), spec.name)
    yield from _sections(spec)
    if spec.sandbox.mode not in SANDBOX_MODES:
        yield _odd(("sandbox", "mode"), spec.sandbox.mode, SANDBOX_MODES, "treated as 'local'")
    yield from _mounts(("sandbox", "mounts"), spec.sandbox.mounts)
    yield from _llm(("llm",), spec.llm)
    yield from _agent(spec)
    if spec.pipeline is not None:
        yield from _pipeline(spec.pipeline)
    if spec.workflow is not None:
        yield from _workflow(spec.workflow)


def _sections(spec: RunSpec) -> Iterator[BrokenRule]:
    for section, phrase in _SECTIONS.items():
        present = getattr(spec, section) is not None
        if spec.kind == section and not present:
            yield BrokenRule(("kind",), f"kind={section} requires '{section}' section")
        elif present and spec.kind == "sandbox":
            yield BrokenRule((section,), f"kind: sandbox does not accept {phrase} block")
        elif present and spec.kind != section:
            yield BrokenRule((section,), f"not used by kind={spec.kind}", level="warning")


def _agent(spec: RunSpec) -> Iterator[BrokenRule]:
    agent = spec.agent
    if agent is None:
        return
    if not agent.prompt.strip() and agent.mode != "interactive":
        yield BrokenRule(("agent", "prompt"), "agent.prompt cannot be empty")
    yield from _program(("agent",), "agent.", agent)
    if agent.mode != "task" and agent.timeout_secs is not None:
        message = f"agent: mode: {agent.mode} and timeout_secs are mutually exclusive"
        yield BrokenRule(("agent", "timeout_secs"), message)
    if agent.mode == "service":
        if not agent.output_file:
            yield BrokenRule(("agent", "mode"), "agent: mode: service requires output_file")
        if spec.llm is not None and spec.llm.credential_proxy:
            message = "agent: mode: service and llm.credential_proxy are mutually exclusive"
            yield BrokenRule(("llm", "credential_proxy"), message)


def _program(location: Location, prefix: str, agent: AgentSpec | BoxSpec) -> Iterator[BrokenRule]:
    if agent.program is not None:
        yield from _blank((*location, "program"), agent.program)
        if agent.command is not None:
            message = f"{prefix}program and {prefix}command are mutually exclusive"
            yield BrokenRule((*location, "program"), message)
    if agent.command is not None:
        yield from _blank((*location, "command", "program"), agent.command.program)


def _llm(location: Location, llm: LlmSpec | None) -> Iterator[BrokenRule]:
    if llm is None:
        return
    if llm.provider not in PROVIDERS:
        yield BrokenRule(
            (*location, "provider"),
            "unknown provider",
            _quoted(llm.provider),
            ", ".join(PROVIDERS),
            nearest(llm.provider, PROVIDERS),
        )
    if llm.key_in_guest and llm.credential_proxy:
        message = "llm.key_in_guest and llm.credential_proxy are mutually exclusive"
        yield BrokenRule((*location, "key_in_guest"), message)
    # Only what goes through the gateway can be counted.
    direct = llm.key_in_guest or llm.provider == "claude-personal"
    for limit in ("max_requests", "max_cost"):
        if direct and getattr(llm, limit) is not None:
            why = "key_in_guest" if llm.key_in_guest else "provider claude-personal"
            message = f"llm.{limit} can't be enforced with {why}"
            yield BrokenRule((*location, limit), message)
    if llm.max_cost is not None and llm.prices is None:
        message = "llm.max_cost requires llm.prices: what a million tokens cost, input and output"
        yield BrokenRule((*location, "max_cost"), message)


def _mounts(location: Location, mounts: Sequence[MountSpec]) -> Iterator[BrokenRule]:
    for index, mount in enumerate(mounts):
        if mount.mode not in MOUNT_MODES:
            yield _odd((*location, index, "mode"), mount.mode, MOUNT_MODES, "treated as 'ro'")


def _pipeline(pipeline: PipelineSpec) -> Iterator[BrokenRule]:
    if not pipeline.boxes:
        yield BrokenRule(("pipeline", "boxes"), "pipeline.boxes cannot be empty")
        return
    boxes = ("pipeline", "boxes")
    names = dict.fromkeys(box.name for box in pipeline.boxes)
    yield from _names(boxes, [box.name for box in pipeline.boxes], "box")
    outputs: dict[str, Location] = {}
    for index, box in enumerate(pipeline.boxes):
        yield from _outputs((*boxes, index), box, outputs)
    for index, box in enumerate(pipeline.boxes):
        yield from _box((*boxes, index), box, outputs)
    yield from _stages(pipeline, names)


def _outputs(
    location: Location, box: BoxSpec, outputs: dict[str, Location]
) -> Iterator[BrokenRule]:
    for index, output in enumerate(box.outputs):
        place = (*location, "outputs", index, "name")
        yield from _blank(place, output.name)
        if output.name in outputs:
            yield BrokenRule(place, f"duplicate output name '{output.name}'")
        outputs.setdefault(output.name, place)


def _box(location: Location, box: BoxSpec, outputs: dict[str, Location]) -> Iterator[BrokenRule]:
    if not box.prompt.strip():
        yield BrokenRule(
            (*location, "prompt"), "the prompt of a box cannot be empty", level="warning"
        )
    yield from _llm((*location, "llm"), box.llm)
    if box.sandbox is not None:
        yield from _mounts((*location, "sandbox", "mounts"), box.sandbox.mounts)
    yield from _program(location, f"box '{box.name}': ", box)
    for index, source in enumerate(box.inputs):
        if source.source not in outputs:
            yield BrokenRule(
                (*location, "inputs", index, "from"),
                f"unknown output '{source.source}'",
                allowed=_listed(outputs) or "none: no box has outputs",
                suggestion=nearest(source.source, islice(outputs, _MAX_COMPARED)),
            )


def _stages(pipeline: PipelineSpec, names: Mapping[str, None]) -> Iterator[BrokenRule]:
    used: set[str] = set()
    for index, stage in enumerate(pipeline.stages):
        location: Location = ("pipeline", "stages", index)
        if isinstance(stage, FanOutStage):
            if index == 0:
                yield BrokenRule((*location, "type"), "pipeline first stage cannot be fan_out")
            if not stage.boxes:
                yield BrokenRule((*location, "boxes"), "a fan_out stage needs at least one box")
            members = [((*location, "boxes", at), name) for at, name in enumerate(stage.boxes)]
        else:
            members = [((*location, "name"), stage.name)]
        for place, name in members:
            if name not in names:
                yield _unknown(place, f"unknown box '{name}'", name, names)
            elif name in used:
                yield BrokenRule(place, f"unknown box '{name}': an earlier stage has used it")
            used.add(name)
    if pipeline.stages:
        for index, name in enumerate(box.name for box in pipeline.boxes):
            if name not in used:
                place = ("pipeline", "boxes", index)
                yield BrokenRule(
                    place, f"box '{name}' is in no stage and never runs", level="warning"
                )


def _workflow(workflow: WorkflowSpec) -> Iterator[BrokenRule]:
    if not workflow.steps:
        yield BrokenRule(("workflow", "steps"), "workflow.steps cannot be empty")
        return
    declared = [step.name for step in workflow.steps]
    names = dict.fromkeys(declared)
    yield from _names(("workflow", "steps"), declared, "step")
    for index, step in enumerate(workflow.steps):
        yield from _step(("workflow", "steps", index), step, names)
    if workflow.output_step is not None and workflow.output_step not in names:
        yield _no_step(("workflow", "output_step"), workflow.output_step, names)
    try:
        dependency_levels(workflow.steps)
    except UnknownStep:
        pass  # told above, step by step
    except CircularDependency as error:
        place = ("workflow", "steps", declared.index(error.step), "depends_on")
        yield BrokenRule(place, str(error))


def _step(location: Location, step: StepSpec, names: Mapping[str, None]) -> Iterator[BrokenRule]:
    if not step.run.program.strip():
        yield BrokenRule((*location, "run", "program"), "the program cannot be empty")
    for index, dependency in enumerate(step.depends_on):
        if dependency not in names:
            yield _no_step((*location, "depends_on", index), dependency, names)
    source = step.run.stdin_from
    place = (*location, "run", "stdin_from")
    if source is not None and source not in names:
        yield _no_step(place, source, names)
    elif source == step.name:
        yield BrokenRule(place, f"step '{step.name}' can't read its own output")
    elif source is not None and not step.depends_on:
        message = f"not waited for; add '{source}' to depends_on"
        yield BrokenRule(place, message, level="warning")
    if step.mode == "service" and step.timeout_secs is not None:
        message = f"step '{step.name}': mode: service and timeout_secs are mutually exclusive"
        yield BrokenRule((*location, "timeout_secs"), message)


def _names(location: Location, names: Sequence[str], what: str) -> Iterator[BrokenRule]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        place = (*location, index, "name")
        yield from _blank(place, name)
        if name in seen:
            yield BrokenRule(place, f"duplicate {what} name '{name}'")
        seen.add(name)


def _blank(location: Location, name: str) -> Iterator[BrokenRule]:
    if not name.strip():
        yield BrokenRule(location, "cannot be empty")


def _no_step(location: Location, name: str, names: Mapping[str, None]) -> BrokenRule:
    return _unknown(location, f"Step '{name}' not found in workflow", name, names)


def _unknown(location: Location, message: str, name: str, names: Mapping[str, None]) -> BrokenRule:
    return BrokenRule(
        location, message, None, _listed(names), nearest(name, islice(names, _MAX_COMPARED))
    )


def _odd(location: Location, found: str, allowed: Sequence[str], outcome: str) -> BrokenRule:
    return BrokenRule(
        location,
        f"unknown mode, {outcome}",
        _quoted(found),
        ", ".join(allowed),
        nearest(found, allowed),
        "warning",
    )


def _listed(names: Mapping[str, object]) -> str:
    shown = [name[:60] for name in islice(names, 12)]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _quoted(text: str) -> str:
    return f"'{text[:60]}'"
