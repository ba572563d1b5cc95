"""What skills come to in the guest: files, MCP servers, and words about what is not done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from voidbus.actors.workloads.remote_skill import remote_skill_url
from voidbus.spec.skill import InlineSkill, McpSkill, OciSkill, ReferenceSkill, Skill

SKILLS_FOLDER = "/workspace/.claude/skills"
SKILL_LIMIT = 1024 * 1024
"""Bytes of a skill, at most."""

_LONGEST_NAME = 100


@dataclass(frozen=True)
class SkillFile:
    """A file of the guest's; `skill` is the one it belongs to, as errors name it. What is at `url`,
    where there is one, is its content."""

    path: str
    content: bytes = field(repr=False)
    skill: str
    url: str | None = None

    @property
    def inside(self) -> str:
        """Its path below the folder of all skills."""
        return self.path.removeprefix(f"{SKILLS_FOLDER}/")


@dataclass(frozen=True)
class McpServer:
    """An MCP server to be started in the guest: `command ARGS --sse --port PORT`."""

    name: str
    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class SkillPlan:
    """What is to be made of an agent's skills. `images` are (reference, guest path); `warnings` are
    (skill, what is not done)."""

    files: tuple[SkillFile, ...] = ()
    servers: tuple[McpServer, ...] = ()
    images: tuple[tuple[str, str], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()

    @property
    def in_folders(self) -> tuple[SkillFile, ...]:
        """The skills as agents other than Claude Code look for them, too."""
        return tuple(file for file in self.files if file.path.endswith("/SKILL.md"))


NO_SKILLS = SkillPlan()


def plan_skills(
    skills: Sequence[Skill],
    base: Path,
    environ: Mapping[str, str] = MappingProxyType({}),
    *,
    takes_images: bool = True,
) -> SkillPlan:
    """Read what is on the host; relative paths start at `base`. `environ` are the host's
    variables; `takes_images`: images can be mounted in the machine.

    Raises ValueError naming the skill whose file can't be read.
    """
    planner = _Planner(base, environ, takes_images)
    for skill in skills:
        planner.take(skill)
    return SkillPlan(
        tuple(planner.files.values()),
        tuple(planner.servers.values()),
        tuple(planner.images),
        tuple(planner.warnings),
    )


class _Planner:
    def __init__(self, base: Path, environ: Mapping[str, str], takes_images: bool) -> None:
        self._base = base
        self._environ = environ
        self._takes_images = takes_images
        self.images: list[tuple[str, str]] = []
        self.files: dict[str, SkillFile] = {}
        self.servers: dict[str, McpServer] = {}
        self.warnings: list[tuple[str, str]] = []

    def take(self, skill: Skill) -> None:
        match skill:
            case InlineSkill():
                self._file(skill.name, skill.content.encode(), f"skill {skill.name}")
            case McpSkill():
                self._server(skill.command, skill.args, skill.env)
            case OciSkill():
                self._image(skill)
            case ReferenceSkill(type="file"):
                self._host_file(skill.value)
            case ReferenceSkill(type="remote"):
                self._remote(skill.value)
            case ReferenceSkill(type="mcp"):
                self._server(skill.value, (), {})
            case _:  # `agent:` and `cli:` say what is there already
                return

    def _file(
        self,
        name: str,
        content: bytes,
        skill: str,
        folder: str | None = None,
        url: str | None = None,
    ) -> None:
        """As the format has it, and where Claude Code itself looks: a folder for each skill."""
        name = PurePosixPath(name).name
        for path in (f"{name}.md", f"{folder or name}/SKILL.md"):
            self.files[path] = SkillFile(f"{SKILLS_FOLDER}/{path}", content, skill, url)

    def _host_file(self, value: str) -> None:
        path = self._base / value
        try:
            with path.open("rb") as file:
                content = file.read(SKILL_LIMIT)
        except OSError as error:
            raise ValueError(
                f"skill file:{value}: {path} can't be read: {error.strerror}"
            ) from error
        # A file that lies as Claude Code wants it is named by its folder.
        folder = path.absolute().parent.name if path.name == "SKILL.md" else None
        self._file(path.stem, content, f"skill file:{value}", folder)

    def _remote(self, value: str) -> None:
        name, url = remote_skill_url(value, self._environ)
        self._file(name, b"", f"skill remote:{value}", url=url)

    def _image(self, skill: OciSkill) -> None:
        """Its files, and a script that puts its programs on PATH (the format's own)."""
        if not self._takes_images:
            self.warnings.append((skill.image, "a mock machine has no images; it is not mounted"))
            return
        self.images.append((skill.image, skill.mount))
        name = PurePosixPath(skill.image.partition("@")[0]).name.partition(":")[0]
        text = f'export PATH={shlex.quote(skill.mount.rstrip("/") + "/bin")}:"$PATH"\n'
        path = f"{name or 'image'}_path.sh"
        self.files[path] = SkillFile(f"{SKILLS_FOLDER}/{path}", text.encode(), skill.image)

    def _server(self, command: str, args: Sequence[str], env: Mapping[str, str]) -> None:
        name = stem = PurePosixPath(command).name[:_LONGEST_NAME] or command
        number = 2
        while name in self.servers:
            name, number = f"{stem}-{number}", number + 1
        self.servers[name] = McpServer(name, command, tuple(args), env)
