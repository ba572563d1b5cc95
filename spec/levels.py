"""The order of a workflow's steps, from what they depend on. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from voidbus.spec.run import StepSpec, WorkflowSpec


class StepOrderError(ValueError):
    """Steps that can't be ordered. `step` is the name the message is about; `dependent` the step
    that names it."""

    def __init__(self, message: str, step: str, dependent: str) -> None:
        super().__init__(message)
        self.step = step
        self.dependent = dependent


class UnknownStep(StepOrderError):
    """A step depends on one that isn't there."""

    def __init__(self, step: str, dependent: str) -> None:
        super().__init__(f"Step '{step}' not found in workflow", step, dependent)


class CircularDependency(StepOrderError):
    """A step depends on itself, through others or directly."""

    def __init__(self, step: str) -> None:
        super().__init__(f"Circular dependency detected at step '{step}'", step, step)


def dependency_levels(steps: Sequence[StepSpec]) -> list[list[StepSpec]]:
    """Steps grouped so that each level needs only earlier ones, every step as early as it can be;
    the declared order is kept within a level.

    Raises UnknownStep and CircularDependency. Names are taken to be unique.
    """
    names = {step.name for step in steps}
    for step in steps:
        for dependency in step.depends_on:
            if dependency not in names:
                raise UnknownStep(dependency, step.name)
    unmet = {step.name: set(step.depends_on) for step in steps}
    dependents: dict[str, list[str]] = {step.name: [] for step in steps}
    for name, needs in unmet.items():
        for need in needs:
            dependents[need].append(name)
    levels: list[list[StepSpec]] = []
    order = {step.name: (index, step) for index, step in enumerate(steps)}
    ready = [step.name for step in steps if not step.depends_on]
    while ready:
        levels.append([step for _, step in sorted((order[name] for name in ready), key=_index)])
        passed, ready = ready, []
        for name in passed:
            for dependent in dependents[name]:
                unmet[dependent].discard(name)
                if not unmet[dependent]:
                    ready.append(dependent)
    waiting = [step for step in steps if unmet[step.name]]
    if waiting:
        raise CircularDependency(_step_on_a_cycle(waiting))
    return levels


def output_step_of(workflow: WorkflowSpec) -> str:
    """The step whose output is the run's: the one named, else the only one nothing depends on,
    else the last in topological order.

    Raises UnknownStep, CircularDependency, and ValueError for a workflow without steps.
    """
    levels = dependency_levels(workflow.steps)
    if not levels:
        raise ValueError("workflow.steps cannot be empty")
    if workflow.output_step is not None:
        if workflow.output_step not in {step.name for step in workflow.steps}:
            raise UnknownStep(workflow.output_step, workflow.output_step)
        return workflow.output_step
    needed = {dependency for step in workflow.steps for dependency in step.depends_on}
    sinks = [step.name for step in workflow.steps if step.name not in needed]
    return sinks[0] if len(sinks) == 1 else levels[-1][-1].name


def _index(entry: tuple[int, StepSpec]) -> int:
    return entry[0]


def _step_on_a_cycle(waiting: Sequence[StepSpec]) -> str:
    """A step that truly is on a cycle, and not merely behind one: every waiting step has a waiting
    dependency, so following those must come back to a step already passed."""
    steps = {step.name: step for step in waiting}
    passed: set[str] = set()
    name = waiting[0].name
    while name not in passed:
        passed.add(name)
        name = next(dependency for dependency in steps[name].depends_on if dependency in steps)
    return name
