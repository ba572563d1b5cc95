"""claudio, the stand-in agent, as a real process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sidecar_kit import inbox, running_sidecar

import voidbus.vm.guest.claudio as claudio_module

assert claudio_module.__file__
SCRIPT = claudio_module.__file__
BIN = Path(sys.executable).parent
FLAGS = ("--output-format", "stream-json", "--verbose", "--dangerously-skip-permissions")


@dataclass
class Session:
    code: int
    events: list[dict[str, Any]]
    noise: int
    stderr: str
    raw: bytes

    @property
    def result(self) -> dict[str, Any]:
        assert self.events[-1]["type"] == "result"
        return self.events[-1]

    def contents(self, kind: str) -> list[dict[str, Any]]:
        return [
            content
            for event in self.events
            if event["type"] in ("assistant", "user")
            for content in event["message"]["content"]
            if content["type"] == kind
        ]


class Claudio:
    """Runs it in a directory of its own."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.output = cwd / "out" / "output.json"

    def run(self, prompt: str | None = None, *more: str, **environment: str) -> Session:
        if prompt is None:
            prompt = f"Do it.\nWrite your output to {self.output}."
        return self.play(["-p", prompt, *FLAGS, *more], **environment)

    def play(self, arguments: list[str], **environment: str) -> Session:
        done = subprocess.run(
            [sys.executable, "-S", SCRIPT, *arguments],
            cwd=self.cwd,
            env={"PATH": f"{BIN}:/usr/bin:/bin", "LC_ALL": "C", **environment},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=50,
            check=False,
        )
        events, noise = [], 0
        for line in done.stdout.split(b"\n")[:-1]:
            try:
                events.append(json.loads(line))
            except ValueError:
                noise += 1
        return Session(done.returncode, events, noise, done.stderr.decode(), done.stdout)


@pytest.fixture
def claudio(tmp_path: Path) -> Claudio:
    return Claudio(tmp_path)


def test_a_session_is_init_turns_and_result(claudio: Claudio) -> None:
    session = claudio.run()
    assert (session.code, session.stderr, session.noise) == (0, "", 0)
    first = session.events[0]
    assert (first["type"], first["subtype"], first["model"]) == ("system", "init", "claudio-1")
    assert first["tools"] == ["Bash", "Read", "Write"]
    result = session.result
    assert (result["is_error"], result["num_turns"], result["duration_ms"]) == (False, 3, 300)
    assert result["total_cost_usd"] > 0
    assert {event["session_id"] for event in session.events} == {first["session_id"]}
    spent = [e["message"]["usage"] for e in session.events if e["type"] == "assistant"]
    for name in ("input_tokens", "output_tokens"):
        assert result["usage"][name] == sum(usage[name] for usage in spent)
    uses = [use["id"] for use in session.contents("tool_use")]
    assert uses == [one["tool_use_id"] for one in session.contents("tool_result")]


def test_the_same_prompt_gives_the_same_bytes_and_another_prompt_does_not(
    claudio: Claudio,
) -> None:
    assert claudio.run("a").raw == claudio.run("a").raw
    assert claudio.run("a").result["session_id"] != claudio.run("b").result["session_id"]


def test_the_output_file_is_json_with_status_and_metrics(claudio: Claudio) -> None:
    claudio.run()
    report = json.loads(claudio.output.read_text())
    assert report["status"] == "success"
    assert report["metrics"] == {"turns": 3, "tool_calls": 0, "intents_sent": 0}
    assert (report["summary"], report["inbox_seen"]) == ("Finished 3 turns.", [])
    assert report["iteration_seen"] is None
    assert [path.name for path in claudio.output.parent.iterdir()] == ["output.json"]


def test_workspace_paths_are_mapped(claudio: Claudio) -> None:
    workspace = claudio.cwd / "ws"
    skills = workspace / ".claude" / "skills"
    skills.mkdir(parents=True)
    (skills / "review.md").write_text("# Review")
    here = claudio.cwd / ".claude" / "skills"
    here.mkdir(parents=True)
    (here / "void-messaging.md").write_text("# Messaging")
    session = claudio.run("Write your output to /workspace/o.json.", VOID_WORKSPACE=str(workspace))
    assert json.loads((workspace / "o.json").read_text())["status"] == "success"
    assert session.events[0]["skills"] == ["review", "void-messaging"]
    assert session.contents("text")[1]["text"] == "Skills: review, void-messaging."


def test_an_mcp_server_that_is_not_there_is_told_and_the_session_goes_on(
    claudio: Claudio,
) -> None:
    config = claudio.cwd / "mcp.json"
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/mcp"
        config.write_text(json.dumps({"mcpServers": {"gone": {"type": "http", "url": url}}}))
        session = claudio.run("p", "--mcp-config", str(config), CLAUDIO_MCP="1")
    assert session.result["subtype"] == "success"
    said = [content["text"] for content in session.contents("text")]
    assert any(text.startswith("MCP server gone: can't reach 127.0.0.1:") for text in said)


def test_model_settings_and_mcp_servers_are_taken(claudio: Claudio) -> None:
    config = claudio.cwd / "mcp.json"
    config.write_text('{"mcpServers": {"void-mcp": {"type": "http", "url": "http://x"}}}')
    more = ("--model", "m1", "--settings", '{"skipWebFetchPreflight":true}')
    first = claudio.run("p", *more, "--mcp-config", str(config)).events[0]
    assert first["model"] == "m1"
    assert first["mcp_servers"] == [{"name": "void-mcp", "status": "connected"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-p"),
        (["-p"], "expected one argument"),
        (["-p", "x"], "--output-format"),
        (["-p", "x", "--output-format", "text"], "invalid choice"),
        (["-p", "x", "--output-format", "stream-json"], "requires --verbose"),
        (["-p", "x", *FLAGS, "--dance"], "--dance"),
        (["-p", "x", *FLAGS, "--settings", "{"], "--settings is not JSON"),
        (["-p", "x", *FLAGS, "--mcp-config", "/none.json"], "/none.json can't be used"),
    ],
)
def test_a_bad_command_line_exits_2_with_a_message(
    claudio: Claudio, arguments: list[str], message: str
) -> None:
    session = claudio.play(arguments)
    assert (session.code, session.raw) == (2, b"")
    assert session.stderr.startswith("claudio: ")
    assert message in session.stderr


def test_a_switch_that_is_no_number_exits_2_and_is_named(claudio: Claudio) -> None:
    session = claudio.run(CLAUDIO_TURNS="many")
    assert (session.code, session.stderr) == (
        2,
        "claudio: CLAUDIO_TURNS must be a whole number, not 'many'\n",
    )


def test_turns_tools_delay_and_exit_code_follow_the_environment(claudio: Claudio) -> None:
    session = claudio.run(
        CLAUDIO_TURNS="2", CLAUDIO_TOOLS="4", CLAUDIO_DELAY_MS="5", CLAUDIO_EXIT_CODE="7"
    )
    assert session.code == 7
    assert (session.result["num_turns"], session.result["duration_ms"]) == (2, 210)
    assert [use["name"] for use in session.contents("tool_use")] == ["Bash"] * 4 + ["Write"]


def test_fail_gives_an_error_result_and_no_output(claudio: Claudio) -> None:
    result = claudio.run(CLAUDIO_FAIL="out of credit").result
    assert (result["is_error"], result["error"]) == (True, "out of credit")
    assert not claudio.output.exists()


def test_garbage_lines_are_mixed_in(claudio: Claudio) -> None:
    session = claudio.run(CLAUDIO_GARBAGE="1")
    assert session.noise == 16
    assert session.result["is_error"] is False


@pytest.mark.parametrize("text", ["not json", "", "ü"])
def test_output_is_written_as_given(claudio: Claudio, text: str) -> None:
    claudio.run(CLAUDIO_OUTPUT=text)
    assert claudio.output.read_text() == text


def test_no_output_writes_none(claudio: Claudio) -> None:
    assert claudio.run(CLAUDIO_OUTPUT="", CLAUDIO_NO_OUTPUT="1").result["is_error"] is False
    assert not claudio.output.exists()


def test_an_output_that_cannot_be_written_is_an_error_result(claudio: Claudio) -> None:
    (claudio.cwd / "out").write_text("a file where a directory should be")
    result = claudio.run().result
    assert result["is_error"] is True
    assert "can't write" in result["error"]


def test_with_a_sidecar_it_reads_its_context_and_inbox_and_sends_intents(claudio: Claudio) -> None:
    with running_sidecar() as sidecar:
        sidecar.server.load_inbox(inbox("m1", "m2", version=1, iteration=4))
        session = claudio.run(VOID_SIDECAR_URL=sidecar.url, CLAUDIO_INTENTS="3")
        intents = sidecar.server.drain()
    assert [(one.kind, one.audience, one.iteration) for one in intents] == [
        ("signal", "broadcast", 4),
        ("signal", "broadcast", 4),
        ("evaluation", "leader", 4),
    ]
    report = json.loads(claudio.output.read_text())
    assert (report["iteration_seen"], report["inbox_seen"]) == (4, ["m1", "m2"])
    assert report["metrics"]["intents_sent"] == 3
    assert [one["is_error"] for one in session.contents("tool_result")] == [False] * 6


def test_one_intent_is_sent_unless_told_otherwise_and_too_many_are_refused(
    claudio: Claudio,
) -> None:
    with running_sidecar() as sidecar:
        claudio.run(VOID_SIDECAR_URL=sidecar.url)
        assert [one.kind for one in sidecar.server.drain()] == ["signal"]
        claudio.run(VOID_SIDECAR_URL=sidecar.url, CLAUDIO_INTENTS="0")
        assert sidecar.server.drain() == []
        session = claudio.run(VOID_SIDECAR_URL=sidecar.url, CLAUDIO_INTENTS="3")
    failed = [one["content"] for one in session.contents("tool_result") if one["is_error"]]
    assert len(failed) == 1
    assert failed[0].startswith("error: HTTP 429")
    assert session.result["is_error"] is False


def test_without_void_message_it_says_so_and_goes_on(claudio: Claudio) -> None:
    session = claudio.run(VOID_SIDECAR_URL="http://127.0.0.1:1", PATH="/nowhere")
    assert {one["content"] for one in session.contents("tool_result") if one["is_error"]} == {
        "void-message: not found on PATH"
    }
    assert session.result["is_error"] is False


def test_hanging_it_ignores_sigterm_until_it_is_killed(claudio: Claudio) -> None:
    process = subprocess.Popen(
        [sys.executable, "-S", SCRIPT, "-p", "x", *FLAGS],
        cwd=claudio.cwd,
        env={"CLAUDIO_HANG": "1"},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["type"] == "system"
        os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert process.stdout.read() == b""
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
