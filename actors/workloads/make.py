"""From a run specification to its workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from voidbus.actors.messaging_skill import messaging_skills
from voidbus.actors.workloads.agent import AgentTask
from voidbus.actors.workloads.agent_program import (
    DEFAULT_AGENT_TIMEOUT,
    DEFAULT_OUTPUT_FILE,
    AgentSettings,
)
from voidbus.actors.workloads.conductor import (
    Conductor,
    MachineRequest,
    Share,
    Workload,
    first_timeout,
)
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.pipeline import BoxPlan, Pipeline, stages_of
from voidbus.actors.workloads.providers import GATEWAY, Launch, launch_of, spending_of
from voidbus.actors.workloads.sandbox import Sandbox
from voidbus.actors.workloads.service import AgentService
from voidbus.actors.workloads.skills import plan_skills
from voidbus.actors.workloads.workflow import STEPS_AT_ONCE, Workflow
from voidbus.sidecar.model_endpoint import ModelSpending
from voidbus.spec.environment import resolve_env
from voidbus.spec.policy import Policy
from voidbus.spec.run import (
    AgentSpec,
    BoxSpec,
    LlmSpec,
    PipelineSpec,
    RunSpec,
    SandboxSpec,
)
from voidbus.spec.skill import Skill

# Machines of one run at once, in a run without a policy.
DEFAULT_MACHINES_AT_ONCE = 4


def machines_at_once(policy: Policy | None) -> int:
    """How many machines a run may have at the same time."""
    return policy.max_parallel_microvms_per_run if policy else DEFAULT_MACHINES_AT_ONCE


def make_workload(
    spec: RunSpec,
    conductor: Conductor,
    *,
    run_id: str,
    host_env: Mapping[str, str],
    input_text: str | None,
    policy: Policy | None,
    base: Path = Path(),
) -> Workload:
    """The workload of a specification. `base` is its folder: relative paths in it start there.

    Raises ValueError for a skill's file, a key or credentials that are missing.
    """
    maker = _Maker(spec, conductor, run_id, host_env, input_text, policy, base)
    if spec.workflow is not None:
        return maker.workflow()
    if spec.agent is not None:
        return maker.agent(spec.agent)
    if spec.pipeline is not None:
        return maker.pipeline(spec.pipeline)
    # Of this kind the variables are not resolved.
    return Sandbox(conductor, MachineRequest(spec.sandbox), dict(spec.sandbox.env))


class _Maker:
    """What the kinds have in common."""

    def __init__(
        self,
        spec: RunSpec,
        conductor: Conductor,
        run_id: str,
        host_env: Mapping[str, str],
        input_text: str | None,
        policy: Policy | None,
        base: Path,
    ) -> None:
        self._spec = spec
        self._conductor = conductor
        self._host_env = host_env
        self._input = input_text
        self._base = base
        self._retries = policy.max_stage_retries if policy is not None else 0
        self._stage_timeout = policy.stage_timeout_secs if policy is not None else None
        self._at_once = policy.max_parallel_microvms_per_run if policy is not None else None
        self._outputs = OutputCollector(conductor, run_id)
        self._spending: dict[int, ModelSpending] = {}

    def workflow(self) -> Workload:
        spec = self._spec
        assert spec.workflow is not None
        return Workflow(
            spec.name,
            spec.workflow,
            self._conductor,
            machine=MachineRequest(spec.sandbox),
            outputs=self._outputs,
            env=resolve_env(spec.sandbox.env, self._host_env),
            input_text=self._input,
            stage_timeout=self._stage_timeout,
            retries=self._retries,
            # Steps share a machine; the cap bounds what the run does side by side all the same.
            at_once=self._at_once if self._at_once is not None else STEPS_AT_ONCE,
        )

    def agent(self, agent: AgentSpec) -> Workload:
        spec = self._spec
        messaging = agent.messaging.enabled
        skills = list(agent.skills)
        if messaging:
            skills += messaging_skills(agent, spec.llm)
        settings = self._settings(
            agent.prompt,
            spec.sandbox,
            self._launch(spec.llm, spec.sandbox, agent),
            skills,
            agent.timeout_secs,
            agent.output_file or DEFAULT_OUTPUT_FILE,
        )
        sandbox = networked(spec.sandbox, settings.launch)
        machine = MachineRequest(
            sandbox,
            stage=spec.name,
            messaging=messaging,
            model=settings.launch.endpoint,
            agent=settings.launch.layer,
            images=settings.skills.images,
        )
        if agent.mode == "service":
            return AgentService(
                spec.name,
                # It goes on for as long as it likes.
                replace(settings, timeout=0),
                self._conductor,
                machine=machine,
                outputs=self._outputs,
                input_text=self._input,
            )
        return AgentTask(
            spec.name,
            settings,
            self._conductor,
            machine=machine,
            outputs=self._outputs,
            input_text=self._input,
            retries=self._retries,
        )

    def pipeline(self, pipeline: PipelineSpec) -> Workload:
        shares = {
            output.name: f"{index}-{at}"
            for index, box in enumerate(pipeline.boxes)
            for at, output in enumerate(box.outputs)
        }
        return Pipeline(
            self._spec.name,
            stages_of(pipeline),
            {box.name: self._box(box, shares) for box in pipeline.boxes},
            self._conductor,
            outputs=self._outputs,
            input_text=self._input,
            retries=self._retries,
        )

    def _box(self, box: BoxSpec, shares: Mapping[str, str]) -> BoxPlan:
        sandbox = box_sandbox(self._spec.sandbox, box)
        given = [Share(shares[out.name], out.guest, writable=True) for out in box.outputs]
        given += [Share(shares[source.source], source.guest, False) for source in box.inputs]
        launch = self._launch(box.llm or self._spec.llm, sandbox, box)
        settings = self._settings(
            box.prompt, sandbox, launch, box.skills, box.timeout_secs, DEFAULT_OUTPUT_FILE
        )
        request = MachineRequest(
            networked(sandbox, launch),
            stage=box.name,
            shares=tuple(given),
            model=launch.endpoint,
            agent=launch.layer,
            images=settings.skills.images,
        )
        return BoxPlan(settings, request)

    def _launch(
        self, llm: LlmSpec | None, sandbox: SandboxSpec, agent: AgentSpec | BoxSpec
    ) -> Launch:
        # Boxes that have the run's model share what it may be asked.
        spending = self._spending.setdefault(id(llm), spending_of(llm))
        return launch_of(
            llm,
            self._host_env,
            guest_env=sandbox.env,
            spending=spending,
            # There is no machine between it and the host.
            gateway="127.0.0.1" if sandbox.mode == "mock" else GATEWAY,
            program=agent.program,
            command=agent.command,
        )

    def _settings(
        self,
        prompt: str,
        sandbox: SandboxSpec,
        launch: Launch,
        skills: Sequence[Skill],
        timeout: int | None,
        output_file: str,
    ) -> AgentSettings:
        return AgentSettings(
            prompt=prompt,
            launch=launch,
            timeout=first_timeout(timeout, self._stage_timeout, DEFAULT_AGENT_TIMEOUT),
            env=resolve_env(sandbox.env, self._host_env),
            skills=plan_skills(
                skills, self._base, self._host_env, takes_images=sandbox.mode != "mock"
            ),
            output_file=output_file,
        )


def networked(sandbox: SandboxSpec, launch: Launch) -> SandboxSpec:
    """The machine of an agent whose model is to be reached from it."""
    if not launch.network:
        return sandbox
    port = launch.host_port
    ports = sandbox.host_ports if port is None else (*sandbox.host_ports, port)
    return sandbox.model_copy(update={"network": True, "host_ports": ports})


def box_sandbox(run: SandboxSpec, box: BoxSpec) -> SandboxSpec:
    """The machine of a box: the run's, with what the box says over it."""
    own = box.sandbox
    if own is None:
        return run
    update: dict[str, object] = {
        field: value
        for field in ("memory_mb", "vcpus", "network", "snapshot")
        if (value := getattr(own, field)) is not None
    }
    update["env"] = {**run.env, **own.env}
    update["mounts"] = (*run.mounts, *own.mounts)
    return run.model_copy(update=update)
