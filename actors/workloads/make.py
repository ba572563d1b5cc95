"""From a run specification to its workload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from voidbus.actors.messaging_skill import MESSAGING_SKILL, MESSAGING_SKILL_NAME
from voidbus.actors.workloads.agent import AgentTask
from voidbus.actors.workloads.conductor import Conductor, Workload
from voidbus.actors.workloads.sandbox import Sandbox
from voidbus.actors.workloads.workflow import Workflow
from voidbus.spec.environment import resolve_env
from voidbus.spec.policy import Policy
from voidbus.spec.run import RunSpec
from voidbus.spec.skill import InlineSkill, ReferenceSkill

# The program an agent run starts; Codex and others come with their providers.
_AGENT_PROGRAM = "claude-code"
_SKILL_LIMIT = 1024 * 1024


class UnsupportedRun(Exception):
    """A valid specification that this release does not run; the text says what to use instead."""


def require_supported(spec: RunSpec) -> None:
    """Raises UnsupportedRun for a kind or mode this release does not run."""
    if spec.kind == "pipeline":
        raise UnsupportedRun(
            "kind: pipeline is not run by this release; use kind: workflow, or one run for each box"
        )
    if spec.agent is not None and spec.agent.mode == "service":
        raise UnsupportedRun("agent mode: service is not run by this release; use mode: task")


def make_workload(
    spec: RunSpec,
    conductor: Conductor,
    *,
    host_env: Mapping[str, str],
    input_text: str | None,
    policy: Policy | None,
    sidecar_url: str | None,
    base: Path = Path(),
) -> Workload:
    """The workload of a specification that `require_supported` let pass.

    `base` is the specification's folder: relative paths in it start there.
    """
    env = dict(resolve_env(spec.sandbox.env, host_env))
    if sidecar_url is not None:
        env["VOID_SIDECAR_URL"] = sidecar_url
    stage_timeout = policy.stage_timeout_secs if policy is not None else None
    if spec.workflow is not None:
        return Workflow(
            spec.name,
            spec.workflow,
            conductor,
            env=env,
            input_text=input_text,
            stage_timeout=stage_timeout,
        )
    if spec.agent is not None:
        llm = spec.llm
        if (llm is None or llm.provider == "claude") and host_env.get("ANTHROPIC_API_KEY"):
            env.setdefault("ANTHROPIC_API_KEY", host_env["ANTHROPIC_API_KEY"])
        takes_model = llm is not None and llm.provider not in ("claude", "claude-personal", "codex")
        return AgentTask(
            spec.name,
            spec.agent,
            conductor,
            env=env,
            program=_AGENT_PROGRAM,
            model=llm.model if llm is not None and takes_model else None,
            skills=_skills(spec, base),
            input_text=input_text,
            stage_timeout=stage_timeout,
        )
    return Sandbox(conductor, dict(spec.sandbox.env))  # of this kind they are not resolved


def _skills(spec: RunSpec, base: Path) -> dict[str, str]:
    """Skill files by name: inline ones, `file:` ones below `base`, and the messaging skill."""
    assert spec.agent is not None
    skills: dict[str, str] = {}
    for skill in spec.agent.skills:
        if isinstance(skill, InlineSkill):
            skills[skill.name] = skill.content
        elif isinstance(skill, ReferenceSkill) and skill.type == "file":
            path = base / skill.value
            with path.open("rb") as file:
                skills[path.stem] = file.read(_SKILL_LIMIT).decode(errors="replace")
    if spec.agent.messaging.enabled:
        skills[MESSAGING_SKILL_NAME] = MESSAGING_SKILL
    return skills
