"""An agent's program on one machine: its files, its command line, and how its stream is judged."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from voidbus.actors.workloads.conductor import (
    ERROR_LIMIT,
    Capture,
    Command,
    Conductor,
    Exit,
    GuestMachine,
    LineSplitter,
)
from voidbus.actors.workloads.stage import Stage
from voidbus.actors.workloads.stream_json import Said, StreamParser, StreamResult

# An agent without a limit of its own, in a run without a policy (seconds).
DEFAULT_AGENT_TIMEOUT = 1200
DEFAULT_OUTPUT_FILE = "/workspace/output.json"
INPUT_FILE = "/workspace/input.json"
SKILLS_FOLDER = "/workspace/.claude/skills"
# How much of the input is repeated in the prompt (bytes); the file has all of it.
_INLINE_INPUT = 4000
# Tools an agent uses are events; past this many they are only counted.
TOOL_EVENTS_LIMIT = 10_000


@dataclass(frozen=True)
class AgentSettings:
    """What an agent is started with. `timeout` in seconds, 0 for none; `skills` by name."""

    prompt: str
    program: str
    timeout: int
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str | None = None
    skills: Mapping[str, str] = field(default_factory=dict)
    output_file: str = DEFAULT_OUTPUT_FILE


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
    """Files first, then the program; `on_end` once it has ended. For one attempt."""

    def __init__(
        self,
        settings: AgentSettings,
        conductor: Conductor,
        stage: Stage,
        on_end: Callable[[AgentEnd], None],
        *,
        input_text: str | None = None,
        on_running: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._conductor = conductor
        self._stage = stage
        self._on_end = on_end
        self._on_running = on_running
        self._input = input_text
        self._parser = StreamParser()
        self._lines = LineSplitter(limit=1024 * 1024)
        self._capture = Capture()
        self._tools_used = 0
        self._files: deque[tuple[str, bytes]] = deque(
            (f"{SKILLS_FOLDER}/{PurePosixPath(skill).name}.md", text.encode())
            for skill, text in settings.skills.items()
        )
        if input_text is not None:
            self._files.append((INPUT_FILE, input_text.encode()))

    def start(self, machine: GuestMachine) -> None:
        """Begin, on a machine that answers."""
        self._write_next(machine)

    def _write_next(self, machine: GuestMachine) -> None:
        if not self._files:
            self._run(machine)
            return
        path, content = self._files.popleft()

        def written(error: str | None) -> None:
            if error is None:
                self._write_next(machine)
            else:
                self._end(Exit(-1), f"cannot write {path} in the guest: {error}")

        machine.write_file(path, content, written)

    def _run(self, machine: GuestMachine) -> None:
        settings = self._settings
        args = [
            "-p",
            self._prompt(),
            "--output-format",
            "stream-json",
            "--verbose",
            "--dangerously-skip-permissions",
        ]
        if settings.model:
            args += ["--model", settings.model]
        args += ["--settings", json.dumps({"skipWebFetchPreflight": True}, separators=(",", ":"))]
        env = dict(settings.env)
        if machine.sidecar_url is not None:
            env["VOID_SIDECAR_URL"] = machine.sidecar_url
        machine.execute(
            self._stage.name,
            Command(settings.program, tuple(args), env, timeout=settings.timeout),
            self._on_output,
            self._on_exit,
        )
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
            self._show(self._parser.feed(line))

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

    def _on_exit(self, end: Exit) -> None:
        for line in self._lines.flush():
            self._show(self._parser.feed(line))
        result = self._parser.result
        program = self._settings.program
        if end.error is not None:
            self._end(end, end.error, crashed=True)
        elif not result.events:
            stderr = self._capture["stderr"].decode(errors="replace").strip()[-500:]
            detail = f"exit code {end.exit_code}" + (f", stderr: {stderr}" if stderr else "")
            error = f"{program} returned no stream-json events ({detail})"
            self._end(end, error)
        elif result.is_error:
            self._end(end, result.error or result.result or "the agent reported an error")
        elif end.exit_code and not result.ended:
            self._end(end, f"{program} ended with exit code {end.exit_code}, no result")
        else:
            self._on_end(AgentEnd(end, result))

    def _end(self, end: Exit, error: str, crashed: bool = False) -> None:
        self._on_end(AgentEnd(end, self._parser.result, error[:ERROR_LIMIT], crashed))
