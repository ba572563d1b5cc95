#!/usr/bin/env python3
"""claudio: a deterministic stand-in for Claude Code, for tests and trials without a model.

It takes Claude Code's command line, prints stream-json as Claude Code does, finds the skills
it is given, talks to the sidecar through `void-message` when VOID_SIDECAR_URL is set, and
writes the output file its prompt names ("Write your output to PATH."). The same prompt gives
the same session, tokens and cost.

Environment:
  CLAUDIO_TURNS      assistant turns (3)
  CLAUDIO_DELAY_MS   pause before each turn, in milliseconds (0)
  CLAUDIO_INTENTS    intents to send (1); the last of two or more is an evaluation to the leader
  CLAUDIO_TOOLS      extra tool calls to report (0)
  CLAUDIO_MCP        call the messaging tools of the MCP servers of --mcp-config
  CLAUDIO_FAIL       end with an error result that says this
  CLAUDIO_EXIT_CODE  exit code (0)
  CLAUDIO_HANG       ignore SIGTERM after the first line, and wait to be killed
  CLAUDIO_GARBAGE    mix lines that are no JSON into the output
  CLAUDIO_OUTPUT     write this text, as it is, to the output file
  CLAUDIO_NO_OUTPUT  write no output file
  CLAUDIO_SERVE      write the output file with each turn, as a service does, not at the end only
  VOID_WORKSPACE     directory that stands for /workspace

Standard library only.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING or __package__:
    from .claudio_mcp import McpClient, McpError
    from .claudio_stream import Stream
else:  # run as a script: the files lie in the same directory
    from claudio_mcp import McpClient, McpError
    from claudio_stream import Stream

DEFAULT_MODEL = "claudio-1"
MESSAGE_DEADLINE = 20.0  # seconds; void-message itself gives up after 15
HANG_DEADLINE = 3600.0  # seconds; nothing waits for ever, not even this


class SettingsError(Exception):
    """The command line or the environment is wrong."""


@dataclass(frozen=True)
class Behaviour:
    """The switches of the environment, checked."""

    turns: int
    delay_ms: int
    intents: int
    tools: int
    mcp: bool
    exit_code: int
    fail: str | None
    hang: bool
    garbage: bool
    output: str | None
    no_output: bool
    serve: bool

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Behaviour":
        """Raises SettingsError naming the variable that holds no whole number."""

        def number(name: str, default: int) -> int:
            text = environ.get(name) or str(default)
            if not (text.isascii() and text.isdigit()):
                raise SettingsError(f"{name} must be a whole number, not {text!r}")
            return int(text)

        return cls(
            turns=max(1, number("CLAUDIO_TURNS", 3)),
            delay_ms=number("CLAUDIO_DELAY_MS", 0),
            intents=number("CLAUDIO_INTENTS", 1),
            tools=number("CLAUDIO_TOOLS", 0),
            mcp=environ.get("CLAUDIO_MCP", "") not in ("", "0"),
            exit_code=number("CLAUDIO_EXIT_CODE", 0),
            fail=environ.get("CLAUDIO_FAIL") or None,
            hang=environ.get("CLAUDIO_HANG", "") not in ("", "0"),
            garbage=environ.get("CLAUDIO_GARBAGE", "") not in ("", "0"),
            output=environ.get("CLAUDIO_OUTPUT"),
            no_output=environ.get("CLAUDIO_NO_OUTPUT", "") not in ("", "0"),
            serve=environ.get("CLAUDIO_SERVE", "") not in ("", "0"),
        )


@dataclass(frozen=True)
class Seen:
    """What the sidecar showed: the iteration of its context, the ids of its messages."""

    iteration: int | None = None
    inbox: Sequence[str] = ()


@dataclass(frozen=True)
class CommandLine:
    """What Claude Code's command line asks for."""

    prompt: str
    model: str
    mcp_servers: dict[str, str]  # URLs by name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Raises SettingsError for a command line Claude Code would not be given here."""
    parser = _Parser(prog="claudio", add_help=False, allow_abbrev=False)
    parser.add_argument("-p", "--print", dest="prompt", required=True)
    parser.add_argument("--output-format", choices=["stream-json"], required=True)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--dangerously-skip-permissions", action="store_true")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--settings")
    parser.add_argument("--mcp-config")
    arguments = parser.parse_args(list(argv))
    if not arguments.verbose:
        raise SettingsError("--output-format stream-json with -p requires --verbose")
    if arguments.settings is not None:
        try:
            json.loads(arguments.settings)
        except ValueError as error:
            raise SettingsError(f"--settings is not JSON: {error}") from None
    return CommandLine(arguments.prompt, arguments.model, _mcp_servers(arguments.mcp_config))


def _mcp_servers(config: str | None) -> dict[str, str]:
    if config is None:
        return {}
    path = mapped(config, os.environ)
    try:
        servers = json.loads(path.read_text())["mcpServers"]
        return {name: str(servers[name].get("url", "")) for name in sorted(servers)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"--mcp-config {config} can't be used: {error!r}") from None


def mapped(path: str, environ: Mapping[str, str]) -> Path:
    """The path; under VOID_WORKSPACE where it is set and the path is under /workspace."""
    workspace = environ.get("VOID_WORKSPACE")
    if workspace and (path == "/workspace" or path.startswith("/workspace/")):
        return Path(workspace) / path.removeprefix("/workspace").lstrip("/")
    return Path(path)


def output_path(prompt: str) -> str | None:
    """The file that the prompt's last "Write your output to PATH." names."""
    named: list[str] = re.findall(r"Write your output to (.+?)\.(?=\s|$)", prompt)
    return named[-1] if named else None


def find_skills(environ: Mapping[str, str]) -> list[str]:
    """Names of the skills in `.claude/skills` here and in the workspace, sorted."""
    places = (Path.cwd() / ".claude/skills", mapped("/workspace/.claude/skills", environ))
    return sorted({skill.stem for place in places for skill in place.glob("*.md")})


class Messenger:
    """Talks to the sidecar as an agent does: through the void-message program on PATH."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.intents_sent = 0

    def run(self, *arguments: str) -> str | None:
        """Its output, or None where it failed; either way a tool call in the stream."""
        succeeded, text = self._call(arguments)
        command = {"command": " ".join(["void-message", *arguments])}
        self._stream.tool("Bash", command, text, failed=not succeeded)
        return text if succeeded else None

    def iteration(self) -> int | None:
        """The iteration the context is of; None where there was no context to be had."""
        try:
            return int(json.loads(self.run("context") or "{}")["iteration"])
        except (ValueError, KeyError, TypeError):
            return None

    def inbox(self) -> list[str]:
        """The ids of the messages in the inbox."""
        text = self.run("inbox")
        try:
            return [str(entry["message_id"]) for entry in json.loads(text or "{}")["entries"]]
        except (ValueError, KeyError, TypeError):
            return []

    def send(self, count: int, session_id: str) -> None:
        """Send this many intents: signals to all, and of several the last is an evaluation."""
        for number in range(1, count + 1):
            last_of_several = number == count and count >= 2
            kind, audience = (
                ("evaluation", "leader") if last_of_several else ("signal", "broadcast")
            )
            summary = f"{kind} {number} of {count} from session {session_id}"
            sent = self.run("send", "--kind", kind, "--audience", audience, "--summary", summary)
            self.intents_sent += sent is not None

    @staticmethod
    def _call(arguments: Sequence[str]) -> tuple[bool, str]:
        program = shutil.which("void-message")
        if program is None:
            return False, "void-message: not found on PATH"
        try:
            done = subprocess.run(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=MESSAGE_DEADLINE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False, f"void-message: no answer within {MESSAGE_DEADLINE:g} s"
        except OSError as error:
            return False, f"void-message: {error}"
        text = (done.stdout if done.returncode == 0 else done.stderr).decode("utf-8", "replace")
        return done.returncode == 0, text.rstrip("\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Play one session; the exit code."""
    try:
        command = read_command_line(sys.argv[1:] if argv is None else argv)
        behaviour = Behaviour.read(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"claudio: {error}\n")
        return 2
    if behaviour.hang:
        # Before the first line, so that who has read it knows SIGTERM is ignored.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return play(command, behaviour)


def play(command: CommandLine, behaviour: Behaviour) -> int:
    """The session itself."""
    stream = Stream(command.prompt, command.model)
    skills = find_skills(os.environ)
    stream.system(skills, list(command.mcp_servers))
    if behaviour.hang:
        return hang()
    if behaviour.garbage:
        stream.noise()

    messenger = Messenger(stream) if os.environ.get("VOID_SIDECAR_URL") else None
    seen = Seen()
    for turn in range(1, behaviour.turns + 1):
        pause(behaviour.delay_ms)
        stream.say(f"Turn {turn} of {behaviour.turns}.")
        if turn == 1:
            stream.say(f"Skills: {', '.join(skills) or 'none'}.")
            seen = look_around(stream, messenger, command, behaviour)
        if behaviour.garbage:
            stream.noise()
        if behaviour.serve:
            serve(stream, command.prompt, turn)
    if messenger is not None:
        messenger.send(behaviour.intents, stream.session_id)

    summary = f"Finished {behaviour.turns} turns."
    path = output_path(command.prompt)
    error = behaviour.fail
    if path is not None and not behaviour.no_output and error is None:
        text = behaviour.output
        if text is None:
            report = {
                "status": "success",
                "summary": summary,
                "metrics": {
                    "turns": behaviour.turns,
                    "tool_calls": stream.tool_calls,
                    "intents_sent": 0 if messenger is None else messenger.intents_sent,
                },
                "iteration_seen": seen.iteration,
                "inbox_seen": list(seen.inbox),
            }
            text = json.dumps(report, indent=2)
        error = write_output(stream, path, text)
    duration = behaviour.turns * (behaviour.delay_ms + 100)
    stream.result(summary, turns=behaviour.turns, duration_ms=duration, error=error)
    return behaviour.exit_code


def look_around(
    stream: Stream, messenger: Messenger | None, command: CommandLine, behaviour: Behaviour
) -> Seen:
    """What the first turn does with all it has, and what the sidecar showed it."""
    seen = Seen()
    if messenger is not None:
        seen = Seen(messenger.iteration(), messenger.inbox())
    for number in range(1, behaviour.tools + 1):
        stream.tool("Bash", {"command": f"echo {number}"}, str(number), failed=False)
    if behaviour.mcp:
        for name, url in command.mcp_servers.items():
            use_tools(stream, name, url)
    return seen


def use_tools(stream: Stream, server: str, url: str) -> None:
    """Read what peers wrote, tell them something, and recommend to the leader: by MCP."""
    session = stream.session_id
    try:
        client = McpClient(url)
        offered = client.tools()
        for tool, arguments in (
            ("read_peer_messages", {}),
            ("broadcast_observation", {"summary_text": f"observed in session {session}"}),
            ("recommend_to_leader", {"summary_text": f"recommended in session {session}"}),
        ):
            if tool in offered:
                succeeded, text = client.call(tool, arguments)
                stream.tool(f"mcp__{server}__{tool}", arguments, text, failed=not succeeded)
    except McpError as error:
        stream.say(f"MCP server {server}: {error}")


def serve(stream: Stream, prompt: str, turn: int) -> None:
    """Leave what there is after this turn, and go on."""
    path = output_path(prompt)
    if path is not None:
        write_output(stream, path, json.dumps({"status": "serving", "turn": turn}))


def write_output(stream: Stream, path: str, text: str) -> str | None:
    """Write the output file, whole or not at all; what went wrong, if anything."""
    target = mapped(path, os.environ)
    partial = target.with_name(f".{target.name}.claudio")
    problem = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(os.fsencode(text))
        partial.replace(target)
    except OSError as error:
        problem = f"can't write {path}: {error.strerror or error}"
    stream.tool("Write", {"file_path": path}, problem or "File written.", failed=bool(problem))
    return problem


def pause(milliseconds: int) -> None:
    """Wait, without a busy loop."""
    if milliseconds:
        select.select([], [], [], milliseconds / 1000)


def hang() -> int:
    """Wait to be killed, on a pipe into which nobody writes."""
    reader, writer = os.pipe()
    try:
        select.select([reader], [], [], HANG_DEADLINE)
    finally:
        os.close(reader)
        os.close(writer)
    return 1


if __name__ == "__main__":
    sys.exit(main())
