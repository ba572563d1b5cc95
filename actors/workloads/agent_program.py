"""An agent's program on one machine: its files, its command line, and how its stream is judged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from voidbus.actors.workloads.agent_stream import Said, StreamResult
from voidbus.actors.workloads.conductor import (
    ERROR_LIMIT,
    Capture,
    Command,
    Conductor,
    Exit,
    GuestMachine,
    LineSplitter,
)
from voidbus.actors.workloads.mcp_servers import McpServers
from voidbus.actors.workloads.providers import Launch
from voidbus.actors.workloads.skills import NO_SKILLS, SkillFile, SkillPlan
from voidbus.actors.workloads.stage import Stage

# An agent without a limit of its own, in a run without a policy (seconds).
DEFAULT_AGENT_TIMEOUT = 1200
DEFAULT_OUTPUT_FILE = "/workspace/output.json"
INPUT_FILE = "/workspace/input.json"
# How much of the input is repeated in the prompt (bytes); the file has all of it.
_INLINE_INPUT = 4000
# Tools an agent uses are events; past this many they are only counted.
TOOL_EVENTS_LIMIT = 10_000


_STAND_IN = (
    "there is neither a key nor another way to a model, so claudio plays the agent; set "
    "ANTHROPIC_API_KEY where the supervisor is started, or llm in the specification"
)


@dataclass(frozen=True)
class AgentSettings:
    """What an agent is started with. `timeout` in seconds, 0 for none; `env` stands over the
    variables of the launch."""

    prompt: str
    launch: Launch
    timeout: int
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    skills: SkillPlan = NO_SKILLS
    output_file: str = DEFAULT_OUTPUT_FILE

    def guest_env(self, machine: GuestMachine) -> dict[str, str]:
        """The variables of every program of this agent's machine."""
        sidecar = machine.sidecar_url
        return {**self.env, **({} if sidecar is None else {"VOID_SIDECAR_URL": sidecar})}

    def servers(self, machine: GuestMachine, conductor: Conductor, stage: Stage) -> McpServers:
        """The agent's MCP servers on a machine; they outlive an attempt of the agent."""
        env = self.guest_env(machine)
        return McpServers(self.skills.servers, machine, conductor, stage, env)


@dataclass(frozen=True)
class AgentEnd:
    """How an agent ended. `error` says why it failed, where it did; `crashed`: it did not end by
    itself."""

    exit: Exit
    said: StreamResult
    error: str | None = None
    crashed: bool = False


class Spending:
    """What all attempts together have cost; those that failed have too."""

    def __init__(self) -> None:
        self.total_cost_usd = 0.0
        self.input_tokens = 0
        self.output_tokens = 0

    def add(self, end: AgentEnd) -> None:
        self.total_cost_usd += end.said.total_cost_usd
        self.input_tokens += end.said.input_tokens
        self.output_tokens += end.said.output_tokens


class AgentProgram:
    """Files first, then the MCP servers, then the program; `on_end` once it has ended. For one
    attempt; `servers` are those of its machine."""

    def __init__(
        self,
        settings: AgentSettings,
        conductor: Conductor,
        stage: Stage,
        on_end: Callable[[AgentEnd], None],
        *,
        servers: McpServers,
        input_text: str | None = None,
        on_running: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._conductor = conductor
        self._stage = stage
        self._on_end = on_end
        self._servers = servers
        self._on_running = on_running
        self._input = input_text
        self._stream = settings.launch.kind.stream()
        self._lines = LineSplitter(limit=1024 * 1024)
        self._capture = Capture()
        self._tools_used = 0
        self._files: deque[SkillFile] = deque()
        self._fetched: dict[str, bytes] = {}  # by URL

    def _all_files(self, machine: GuestMachine) -> list[SkillFile]:
        """Those of no skill have an empty name in its place."""
        settings = self._settings
        files = list(settings.skills.files)
        launch = settings.launch
        folder = launch.kind.skills_folder
        own_way = settings.skills.in_folders if folder is not None else ()
        files += [replace(file, path=f"{folder}/{file.inside}") for file in own_way]
        own = {**launch.files, **launch.kind.files(self._servers.urls, machine.model_url)}
        files += [SkillFile(path, content, "") for path, content in own.items()]
        if self._input is not None:
            files.append(SkillFile(INPUT_FILE, self._input.encode(), ""))
        return files

    def start(self, machine: GuestMachine) -> None:
        """Begin, on a machine that answers."""
        if self._stage.attempt == 1:
            for skill, why in self._settings.skills.warnings:
                message = f"skill {skill}: {why}"
                self._stage.emit("skill.warning", message, level="warn", payload={"skill": skill})
            if self._settings.launch.stand_in:
                self._stage.emit("agent.stand_in", _STAND_IN, level="warn")
        self._files.extend(self._all_files(machine))
        self._write_next(machine)

    def _write_next(self, machine: GuestMachine) -> None:
        if not self._files:
            self._start_servers(machine)
            return
        file = self._files.popleft()
        if file.url is not None and file.url not in self._fetched:
            self._files.appendleft(file)
            self._fetch(machine, file.skill, file.url)
            return

        def written(error: str | None) -> None:
            if error is None:
                self._write_next(machine)
            else:
                whose = f"{file.skill}: " if file.skill else ""
                self._end(Exit(-1), f"{whose}cannot write {file.path} in the guest: {error}")

        content = file.content if file.url is None else self._fetched[file.url]
        machine.write_file(file.path, content, written)

    def _fetch(self, machine: GuestMachine, skill: str, url: str) -> None:
        def fetched(outcome: bytes | str) -> None:
            if isinstance(outcome, str):
                self._end(Exit(-1), f"{skill}: {outcome}")
                return
            self._fetched[url] = outcome
            self._write_next(machine)

        self._conductor.fetch_skill(url, fetched)

    def _start_servers(self, machine: GuestMachine) -> None:
        def ready(error: str | None) -> None:
            if error is None:
                self._run(machine)
            else:
                self._end(Exit(-1), error)

        self._servers.start(ready)

    def _run(self, machine: GuestMachine) -> None:
        settings = self._settings
        launch, prompt, url = settings.launch, self._prompt(), machine.model_url
        kind = launch.kind
        model = {} if url is None else {launch.url_variable: url}
        command = Command(
            kind.program,
            kind.arguments(prompt, mcp=bool(self._servers.urls)),
            {**kind.environment, **launch.env, **model, **settings.guest_env(machine)},
            stdin=kind.stdin(prompt),
            timeout=settings.timeout,
        )
        machine.execute(self._stage.name, command, self._on_output, self._on_exit)
        self._on_running()

    def _prompt(self) -> str:
        prompt = self._settings.prompt
        if self._input is not None:
            inlined = self._input.encode()[:_INLINE_INPUT].decode(errors="ignore")
            prompt += f"\n\n--- Previous stage output ---\n{inlined}\n--- Previous stage output ---"
        return f"{prompt}\n\nWrite your output to {self._settings.output_file}."

    def _on_output(self, stream: str, data: bytes) -> None:
        if stream != "stdout":
            self._capture.add(stream, data)
            self._conductor.log(self._stage.name, stream, data)
            return
        for line in self._lines.feed(data):
            self._show(self._stream.feed(line))

    def _show(self, said: list[Said]) -> None:
        for item in said:
            if item.kind == "tool":
                self._show_tool(item)
            else:
                self._conductor.log(self._stage.name, "stdout", item.text.encode() + b"\n")

    def _show_tool(self, item: Said) -> None:
        self._tools_used += 1
        if self._tools_used <= TOOL_EVENTS_LIMIT:
            payload = {"tool": item.text, "input": item.tool_input}
            self._stage.emit("agent.tool_used", item.text, payload=payload)
        elif self._tools_used == TOOL_EVENTS_LIMIT + 1:
            message = (
                f"the agent used more than {TOOL_EVENTS_LIMIT} tools; what follows is not kept"
            )
            self._stage.emit("agent.tools_cut", message, level="warn")

    def _tell_spending(self) -> None:
        endpoint = self._settings.launch.endpoint
        totals = endpoint.spending.totals() if endpoint is not None else None
        if totals is not None and (totals.requests or totals.refused):
            message = f"the model was asked {totals.requests} times"
            self._stage.emit("model.used", message, payload=totals._asdict())

    def _on_exit(self, end: Exit) -> None:
        self._tell_spending()
        for line in self._lines.flush():
            self._show(self._stream.feed(line))
        if end.error is not None:
            self._end(end, end.error, crashed=True)
            return
        program = self._settings.launch.kind.program
        error = self._stream.judge(program, end.exit_code, self._capture["stderr"])
        if error is not None:
            self._end(end, error)
        else:
            self._on_end(AgentEnd(end, self._result()))

    def _end(self, end: Exit, error: str, crashed: bool = False) -> None:
        self._on_end(AgentEnd(end, self._result(), error[:ERROR_LIMIT], crashed))

    def _result(self) -> StreamResult:
        result = self._stream.result
        if self._settings.launch.free:
            result.total_cost_usd = 0.0
        return result
