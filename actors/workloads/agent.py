"""Kind `agent`, mode `task`: one agent program, a prompt, an output file."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import PurePosixPath

from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.conductor import (
    ERROR_LIMIT,
    REPORT_LIMIT,
    Capture,
    Command,
    Conductor,
    Exit,
    Level,
    LineSplitter,
    Verdict,
    Workload,
    clip,
    first_timeout,
)
from voidbus.actors.workloads.stream_json import Said, StreamParser
from voidbus.spec.run import AgentSpec

# An agent without a limit of its own, in a run without a policy (seconds).
DEFAULT_AGENT_TIMEOUT = 1200
DEFAULT_OUTPUT_FILE = "/workspace/output.json"
INPUT_FILE = "/workspace/input.json"
SKILLS_FOLDER = "/workspace/.claude/skills"
# How much of the input is repeated in the prompt (bytes); the file has all of it.
_INLINE_INPUT = 4000
# Tools an agent uses are events; past this many they are only counted.
TOOL_EVENTS_LIMIT = 10_000


class AgentTask(Workload):
    """Files first, then the agent, then its output file. The stage is named as the run's spec."""

    def __init__(
        self,
        name: str,
        spec: AgentSpec,
        conductor: Conductor,
        *,
        env: dict[str, str],
        program: str,
        model: str | None,
        skills: dict[str, str],
        input_text: str | None,
        stage_timeout: int | None,
    ) -> None:
        self._name = name
        self._spec = spec
        self._conductor = conductor
        self._env = env
        self._program = program
        self._model = model
        self._input = input_text
        self._timeout = first_timeout(spec.timeout_secs, stage_timeout, DEFAULT_AGENT_TIMEOUT)
        self._output_file = spec.output_file or DEFAULT_OUTPUT_FILE
        self._parser = StreamParser()
        self._lines = LineSplitter(limit=1024 * 1024)
        self._capture = Capture()
        self._ended = False
        self._tools_used = 0
        self._files: deque[tuple[str, bytes]] = deque(
            (f"{SKILLS_FOLDER}/{PurePosixPath(skill).name}.md", text.encode())
            for skill, text in skills.items()
        )
        if input_text is not None:
            self._files.append((INPUT_FILE, input_text.encode()))

    def begin(self) -> None:
        self._emit("stage.queued", "agent queued", payload={"depends_on": []})
        self._emit("stage.started", "agent started", payload={"stage_attempt": 1})
        self._write_next()

    def cancelled(self) -> list[tuple[str, str]]:
        return [] if self._ended else [(self._name, "started")]

    def _write_next(self) -> None:
        if not self._files:
            self._run()
            return
        path, content = self._files.popleft()

        def written(error: str | None) -> None:
            if error is None:
                self._write_next()
            else:
                self._fail(f"cannot write {path} in the guest: {error}", Exit(-1))

        self._conductor.write_file(path, content, written)

    def _run(self) -> None:
        args = [
            "-p",
            self._prompt(),
            "--output-format",
            "stream-json",
            "--verbose",
            "--dangerously-skip-permissions",
        ]
        if self._model:
            args += ["--model", self._model]
        args += ["--settings", json.dumps({"skipWebFetchPreflight": True}, separators=(",", ":"))]
        self._conductor.execute(
            self._name,
            Command(self._program, tuple(args), self._env, timeout=self._timeout),
            self._on_output,
            self._on_exit,
        )

    def _prompt(self) -> str:
        prompt = self._spec.prompt
        if self._input is not None:
            inlined = self._input.encode()[:_INLINE_INPUT].decode(errors="ignore")
            prompt += f"\n\n--- Previous stage output ---\n{inlined}\n--- Previous stage output ---"
        return f"{prompt}\n\nWrite your output to {self._output_file}."

    def _on_output(self, stream: str, data: bytes) -> None:
        if stream != "stdout":
            self._capture.add(stream, data)
            self._conductor.log(self._name, stream, data)
            return
        for line in self._lines.feed(data):
            self._show(self._parser.feed(line))

    def _show(self, said: list[Said]) -> None:
        for item in said:
            if item.kind == "tool":
                self._show_tool(item)
            else:
                self._conductor.log(self._name, "stdout", item.text.encode() + b"\n")

    def _show_tool(self, item: Said) -> None:
        self._tools_used += 1
        if self._tools_used <= TOOL_EVENTS_LIMIT:
            payload = {"tool": item.text, "input": item.tool_input}
            self._emit("agent.tool_used", item.text, payload=payload)
        elif self._tools_used == TOOL_EVENTS_LIMIT + 1:
            message = (
                f"the agent used more than {TOOL_EVENTS_LIMIT} tools; what follows is not kept"
            )
            self._emit("agent.tools_cut", message, level="warn")

    def _on_exit(self, end: Exit) -> None:
        for line in self._lines.flush():
            self._show(self._parser.feed(line))
        result = self._parser.result
        if end.error is not None:
            self._fail(end.error, end)
        elif not result.events:
            stderr = self._capture["stderr"].decode(errors="replace").strip()[-500:]
            detail = f"exit code {end.exit_code}" + (f", stderr: {stderr}" if stderr else "")
            self._fail(f"{self._program} returned no stream-json events ({detail})", end)
        elif result.is_error:
            self._fail(result.error or result.result or "the agent reported an error", end)
        elif end.exit_code and not result.ended:
            self._fail(f"{self._program} ended with exit code {end.exit_code}, no result", end)
        else:
            self._conductor.read_file(self._output_file, lambda data: self._complete(end, data))

    def _complete(self, end: Exit, output: bytes | None) -> None:
        self._ended = True
        self._emit(
            "stage.completed",
            "agent completed",
            payload={"duration_ms": end.duration_ms, "exit_code": 0, "stage_attempt": 1},
        )
        # The file's first bytes are enough for what a report holds, however large it is.
        text = self._parser.result.result or (output or b"")[:REPORT_LIMIT].decode(errors="replace")
        self._conductor.finish(Verdict(True, self._report(True, text), exit_code=end.exit_code))

    def _fail(self, error: str, end: Exit) -> None:
        self._ended = True
        error = error[:ERROR_LIMIT]
        self._emit(
            "stage.failed",
            "agent failed",
            level="error",
            payload={
                "duration_ms": end.duration_ms,
                "exit_code": end.exit_code or 1,
                "error": error,
                "stage_attempt": 1,
            },
        )
        report = self._report(False, self._parser.result.result)
        self._conductor.finish(Verdict(False, report, error, exit_code=end.exit_code))

    def _report(self, success: bool, output: str) -> RunReport:
        result = self._parser.result
        return RunReport(
            name=self._name,
            kind="agent",
            success=success,
            output=clip(output, REPORT_LIMIT),
            stages=1,
            total_cost_usd=result.total_cost_usd,
            input_tokens=result.input_tokens,
            output_tokens=result.output_tokens,
        )

    def _emit(
        self,
        event_type: str,
        message: str,
        *,
        level: Level = "info",
        payload: Mapping[str, object] | None = None,
    ) -> None:
        self._conductor.emit(
            event_type,
            message,
            level=level,
            payload=payload,
            stage=self._name,
            group="g0",
            box=self._name,
        )
