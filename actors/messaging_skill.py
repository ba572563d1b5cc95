"""What an agent is given when messaging is on: how to talk to its peers, and the tools for it."""

from __future__ import annotations

from voidbus.spec.run import AgentSpec, LlmSpec
from voidbus.spec.skill import InlineSkill, ReferenceSkill, Skill

MESSAGING_SKILL_NAME = "void-messaging"

MESSAGING_SKILL = """\
---
name: void-messaging
description: Read messages from peer agents, send observations and recommendations.
---

# Messaging

You work beside other agents on the same task. The `void-message` command connects you.

- `void-message context` prints who you are and which iteration this is.
- `void-message inbox` prints what peers sent; `--since N` only what is newer than version N.
- `void-message send --kind signal --audience broadcast --summary TEXT` tells every peer something
  you observed.
- `void-message send --kind proposal --audience leader --summary TEXT` recommends a solution to the
  leader; `--kind evaluation` judges one.
- `--priority high|normal|low` says how urgent it is.

Read your inbox before you start and before you finish. Send at most three messages an iteration.
Keep a message under 4096 bytes.
"""

MCP_SKILL_NAME = "void-mcp"
# Bridges of an agent that speaks MCP, and skills that name such an agent.
_BRIDGES = ("claude", "claude-code", "void-mcp")
_AGENTS = ("claude-code", "claude")
_PROVIDERS = ("claude", "codex")


def messaging_skills(agent: AgentSpec, llm: LlmSpec | None) -> list[Skill]:
    """The skills of an agent with messaging, beside its own."""
    skills: list[Skill] = [InlineSkill(name=MESSAGING_SKILL_NAME, content=MESSAGING_SKILL)]
    references = [skill for skill in agent.skills if isinstance(skill, ReferenceSkill)]
    speaks_mcp = (
        agent.messaging.provider_bridge in _BRIDGES
        or llm is None
        or llm.provider in _PROVIDERS
        or any(skill.type == "agent" and skill.value in _AGENTS for skill in references)
    )
    has_it = any(skill.type == "mcp" and skill.value == MCP_SKILL_NAME for skill in references)
    if speaks_mcp and not has_it:
        skills.append(ReferenceSkill(type="mcp", value=MCP_SKILL_NAME))
    return skills
