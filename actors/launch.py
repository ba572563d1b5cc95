"""From a request to start a run to what is journaled about it before anything starts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from voidbus.actors.event import EventMaker, timestamp
from voidbus.actors.messages.runs import RunEvent, RunState, RunStatus, StartRun
from voidbus.spec.environment import with_llm_overrides
from voidbus.spec.loader import load_run_spec
from voidbus.spec.policy import Policy
from voidbus.spec.problem import SpecError
from voidbus.spec.run import RunSpec
from voidbus.spec.skill import InlineSkill, McpSkill, OciSkill, Skill
from voidbus.vm.machine import MachineError
from voidbus.vm.select import select_machine

_INPUT_LIMIT = 1024 * 1024


class LaunchRefused(Exception):
    """The run can't be started as asked; the text says what is wrong and where."""


@dataclass(frozen=True)
class Launch:
    """A run to be journaled. `spec` is None, and `problem` says why, where it can only fail."""

    run_id: str
    file: str
    spec: RunSpec | None
    problem: str | None
    state: RunState
    events: tuple[RunEvent, ...]
    warnings: tuple[str, ...]
    input: str | None
    policy: dict[str, Any] | None

    @property
    def spec_json(self) -> str:
        return self.spec.model_dump_json(by_alias=True) if self.spec is not None else ""

    def directory(self, runs_dir: Path) -> Path:
        """The run's own directory."""
        return runs_dir / self.run_id


def prepare(request: StartRun, run_id: str) -> Launch:
    """Read and check everything a run needs. Blocks on the disk.

    Raises LaunchRefused; where the request is not strict, a bad specification makes a Launch that
    can only fail, with the same words.
    """
    policy = _policy(request.policy)
    if request.input is not None and len(request.input.encode()) > _INPUT_LIMIT:
        raise LaunchRefused(f"the input is over {_INPUT_LIMIT} bytes; mount it as a file")
    spec: RunSpec | None = None
    problem: str | None = None
    warnings: tuple[str, ...] = ()
    try:
        loaded = load_run_spec(Path(request.file))
        spec = with_llm_overrides(loaded.spec, os.environ)
        warnings = tuple(str(warning) for warning in loaded.warnings)
        if request.snapshot or spec.sandbox.snapshot:
            warnings += ("there are no snapshots in this release; the machine boots cold",)
        select_machine(spec.sandbox.mode)
    except (SpecError, MachineError) as error:
        spec, problem = None, str(error)
    if problem is not None and request.strict:
        raise LaunchRefused(problem)
    state = RunState(
        id=run_id,
        status=RunStatus.RUNNING,
        file=request.file,
        name=spec.name if spec else "",
        kind=spec.kind if spec else "",
        mode=spec.sandbox.mode if spec else "",
        started_at=timestamp(time.time_ns()),
        updated_at=timestamp(time.time_ns()),
        policy=policy,
    )
    events = _first_events(state, spec, problem, warnings)
    return Launch(
        run_id, request.file, spec, problem, state, events, warnings, request.input, policy
    )


def _policy(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    try:
        return Policy.model_validate(given).model_dump()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}".lstrip(": ")
            for item in error.errors(include_url=False)
        )
        raise LaunchRefused(f"policy: {problems}") from None


def _first_events(
    state: RunState, spec: RunSpec | None, problem: str | None, warnings: tuple[str, ...]
) -> tuple[RunEvent, ...]:
    """The events every run begins with, before anything is started."""
    maker = EventMaker(state.id, state.mode)
    events = [
        maker.make("run.started", f"run created for {state.file}"),
        maker.make("env.provisioned", f"environment env-{state.id} provisioned"),
    ]
    if spec is None:
        events.append(maker.make("spec.parse_failed", problem or "", level="warn"))
        return tuple(events)
    events.append(maker.make("run.spec.loaded", f"loaded {spec.kind} {spec.name}"))
    events += [maker.make("spec.warning", warning, level="warn") for warning in warnings]
    if spec.workflow is not None:
        steps = [step.name for step in spec.workflow.steps]
        events.append(
            maker.make("workflow.planned", f"{len(steps)} steps planned", payload={"steps": steps})
        )
    elif spec.agent is not None:
        events += _mounted(maker, spec.name, spec.agent.skills)
    elif spec.pipeline is not None:
        for box in spec.pipeline.boxes:
            events.append(maker.make("box.started", f"box {box.name} planned", box=box.name))
            events += _mounted(maker, box.name, box.skills)
    return tuple(events)


def _mounted(maker: EventMaker, box: str, skills: Sequence[Skill]) -> list[RunEvent]:
    return [
        maker.make("skill.mounted", f"skill {kind}:{name}", box=box, skill=(kind, name))
        for kind, name in map(_describe_skill, skills)
    ]


def _describe_skill(skill: Skill) -> tuple[str, str]:
    if isinstance(skill, InlineSkill):
        return "inline", skill.name
    if isinstance(skill, OciSkill):
        return "oci", skill.image
    if isinstance(skill, McpSkill):
        return "mcp", skill.command
    return skill.type, skill.value
