"""The agent task: its files, its prompt, its command line, and how its stream is judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conductor_kit import FakeConductor

from voidbus.actors.workloads import agent_program as agent_module
from voidbus.actors.workloads.agent import AgentTask
from voidbus.actors.workloads.agent_kinds import ClaudeCode
from voidbus.actors.workloads.agent_program import DEFAULT_OUTPUT_FILE, AgentSettings
from voidbus.actors.workloads.conductor import ERROR_LIMIT, REPORT_LIMIT, MachineRequest
from voidbus.actors.workloads.make import make_workload
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.pipeline import Pipeline
from voidbus.actors.workloads.providers import Launch
from voidbus.actors.workloads.sandbox import Sandbox
from voidbus.actors.workloads.service import AgentService
from voidbus.actors.workloads.skills import plan_skills
from voidbus.actors.workloads.workflow import Workflow
from voidbus.spec.policy import Policy
from voidbus.spec.run import RunSpec, SandboxSpec
from voidbus.spec.skill import InlineSkill


def lines(*events: dict[str, Any] | str) -> bytes:
    texts = (e if isinstance(e, str) else json.dumps(e) for e in events)
    return b"".join(text.encode() + b"\n" for text in texts)


SYSTEM = {"type": "system", "session_id": "s", "model": "m"}
RESULT = {
    "type": "result",
    "result": "all done",
    "total_cost_usd": 0.25,
    "usage": {"input_tokens": 70, "output_tokens": 7},
}


def says(*parts: dict[str, Any], tokens: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    usage = {"input_tokens": tokens[0], "output_tokens": tokens[1]}
    return {"type": "assistant", "message": {"content": list(parts), "usage": usage}}


def begin(
    *,
    input_text: str | None = None,
    timeout: int = 60,
    model: str | None = None,
    skills: Sequence[tuple[str, str]] = (),
    conductor: FakeConductor | None = None,
    output_file: str = DEFAULT_OUTPUT_FILE,
    retries: int = 0,
) -> tuple[FakeConductor, AgentTask]:
    conductor = conductor or FakeConductor()
    task = AgentTask(
        "scout",
        AgentSettings(
            prompt="Do it.",
            launch=Launch(ClaudeCode("claude-code", model)),
            timeout=timeout,
            env={"KEY": "value"},
            skills=plan_skills([InlineSkill(name=n, content=c) for n, c in skills], Path()),
            output_file=output_file,
        ),
        conductor,
        machine=MachineRequest(SandboxSpec()),
        outputs=OutputCollector(conductor, "r1"),
        input_text=input_text,
        retries=retries,
    )
    task.begin()
    conductor.settle()
    return conductor, task


def prompt_of(conductor: FakeConductor) -> str:
    args = conductor.commands["scout"].args
    return args[args.index("-p") + 1]


def skills_written(conductor: FakeConductor) -> dict[str, bytes]:
    folder = "/workspace/.claude/skills/"
    written = conductor.written.items()
    return {path.removeprefix(folder): text for path, text in written if path.startswith(folder)}


# -- before it starts --------------------------------------------------------------------------


def test_the_stage_is_named_as_the_run_and_queued_before_anything_is_written() -> None:
    conductor, _ = begin()
    assert conductor.types()[:2] == ["stage.queued", "stage.started"]
    assert {(e.stage, e.group, e.box) for e in conductor.events} == {("scout", "g0", "scout")}


def test_the_command_line_is_claude_codes() -> None:
    conductor, _ = begin()
    command = conductor.commands["scout"]
    assert command.program == "claude-code"
    # It asks its model once the tools of its MCP servers are there, and not before.
    assert command.env == {"KEY": "value", "MCP_CONNECTION_NONBLOCKING": "0"}
    assert command.args == (
        "-p",
        "Do it.\n\nWrite your output to /workspace/output.json.",
        "--output-format",
        "stream-json",
        "--verbose",
        "--dangerously-skip-permissions",
        "--settings",
        '{"skipWebFetchPreflight":true}',
    )


def test_a_model_is_named_where_there_is_one() -> None:
    conductor, _ = begin(model="qwen")
    args = conductor.commands["scout"].args
    assert args[args.index("--model") + 1] == "qwen"


def test_the_prompt_ends_with_the_output_file_of_the_specification() -> None:
    conductor, _ = begin(output_file="/workspace/x.md")
    assert prompt_of(conductor).endswith("Write your output to /workspace/x.md.")


def test_input_is_a_file_and_stands_in_the_prompt() -> None:
    conductor, _ = begin(input_text="what came before")
    assert conductor.written["/workspace/input.json"] == b"what came before"
    assert "--- Previous stage output ---\nwhat came before\n---" in prompt_of(conductor)


def test_input_is_cut_in_the_prompt_at_4000_bytes_where_a_character_ends() -> None:
    conductor, _ = begin(input_text="é" * 1999 + "a" + "é" * 1000)
    inlined = prompt_of(conductor).split("--- Previous stage output ---\n")[1].rstrip("\n")
    assert inlined == "é" * 1999 + "a", "3999 bytes: the next character would be half one"
    assert len(conductor.written["/workspace/input.json"]) == 1999 * 2 + 1 + 2000


def test_skills_are_written_before_the_agent_starts() -> None:
    conductor = FakeConductor()
    begin(skills=[("one", "# One"), ("../two", "# Two")], conductor=conductor)
    assert skills_written(conductor) == {
        "one.md": b"# One",
        "one/SKILL.md": b"# One",
        "two.md": b"# Two",
        "two/SKILL.md": b"# Two",
    }
    assert conductor.stages_running() == ["scout"]


def test_a_file_that_cannot_be_written_fails_the_run_and_starts_nothing() -> None:
    conductor = FakeConductor()
    conductor.write_errors["/workspace/input.json"] = "disk full"
    begin(input_text="x", conductor=conductor)
    assert conductor.running == []
    assert conductor.verdict.error == ("cannot write /workspace/input.json in the guest: disk full")
    assert conductor.types()[-1] == "stage.failed"


@pytest.mark.parametrize(
    ("own", "policy", "expected"),
    [(None, None, 1200), (None, 90, 90), (7, 90, 7), (0, 90, 0)],
)
def test_the_agents_own_timeout_comes_before_the_policys(
    own: int | None, policy: int | None, expected: int
) -> None:
    given = None if policy is None else Policy(stage_timeout_secs=policy)
    _, conductor = make(agent_run(agent={"prompt": "x", "timeout_secs": own}), policy=given)
    assert conductor.commands["scout"].timeout == expected


# -- how it ends -------------------------------------------------------------------------------


def test_a_good_stream_completes_the_stage_and_reports_cost_and_tokens() -> None:
    conductor, _ = begin()
    assert conductor.open_stages() == [("scout", "started")]
    conductor.end("scout", stdout=lines(SYSTEM, says(), RESULT), duration_ms=9)
    assert conductor.event("stage.completed").payload == {
        "duration_ms": 9,
        "exit_code": 0,
        "stage_attempt": 1,
    }
    report = conductor.verdict.report
    assert report is not None
    assert (report.kind, report.name, report.success, report.stages) == ("agent", "scout", True, 1)
    assert (report.output, report.total_cost_usd) == ("all done", 0.25)
    assert (report.input_tokens, report.output_tokens) == (70, 7), "the result's stand over sums"
    assert conductor.open_stages() == []


def test_a_result_without_text_falls_back_to_the_output_file() -> None:
    conductor, _ = begin(output_file="/workspace/x.json")
    conductor.files["/workspace/x.json"] = b'{"status": "ok"}'
    conductor.end("scout", stdout=lines(SYSTEM, {"type": "result", "result": ""}))
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == '{"status": "ok"}'


def test_an_agent_without_result_and_file_that_exits_well_has_an_empty_output() -> None:
    conductor, _ = begin()
    conductor.end("scout", stdout=lines(SYSTEM))
    assert conductor.verdict.success
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == ""


def test_no_events_at_all_is_a_failure_that_shows_stderr() -> None:
    conductor, _ = begin()
    conductor.end("scout", 127, stdout=b"what?\n", stderr=b"claude-code: not found\n")
    assert conductor.verdict.error == (
        "claude-code returned no stream-json events (exit code 127, stderr: claude-code: not found)"
    )
    assert conductor.event("stage.failed").payload["exit_code"] == 127


def test_lines_that_are_no_json_do_not_count_as_events() -> None:
    conductor, _ = begin()
    conductor.end("scout", stdout=b'hello\n[]\n"x"\n{"type": 3}\n{"no": "type"}\n\xff\xfe\n')
    assert not conductor.verdict.success
    assert conductor.verdict.error is not None
    assert "no stream-json events" in conductor.verdict.error


def test_garbage_between_events_is_shown_and_does_no_harm() -> None:
    conductor, _ = begin()
    conductor.end("scout", stdout=lines("npm warn", SYSTEM, "{half", RESULT))
    assert conductor.verdict.success
    assert [data for _, _, data in conductor.logged] == [b"npm warn\n", b"{half\n"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"result": "it broke", "error": "overloaded"}, "overloaded"),
        ({"result": "it broke"}, "it broke"),
        ({}, "the agent reported an error"),
    ],
)
def test_an_error_in_the_result_fails_the_stage(fields: dict[str, Any], error: str) -> None:
    conductor, _ = begin()
    conductor.end("scout", stdout=lines(SYSTEM, {"type": "result", "is_error": True, **fields}))
    assert conductor.verdict.error == error
    payload = conductor.event("stage.failed").payload
    assert (payload["exit_code"], payload["error"]) == (1, error)
    assert conductor.verdict.report is not None
    assert not conductor.verdict.report.success


def test_a_non_zero_exit_with_a_good_result_is_no_failure() -> None:
    conductor, _ = begin()
    conductor.end("scout", 1, stdout=lines(SYSTEM, RESULT))
    assert conductor.verdict.success
    assert conductor.verdict.exit_code == 1


def test_a_non_zero_exit_before_any_result_is_a_failure() -> None:
    conductor, _ = begin()
    conductor.end("scout", 3, stdout=lines(SYSTEM, says({"type": "text", "text": "hm"})))
    assert conductor.verdict.error == "claude-code ended with exit code 3, no result"
    assert conductor.event("stage.failed").payload["exit_code"] == 3


def test_a_timeout_fails_the_stage_whatever_the_stream_says() -> None:
    conductor, _ = begin()
    conductor.end(
        "scout", -1, stdout=lines(SYSTEM, RESULT), error="Process killed after 5s timeout"
    )
    assert conductor.verdict.error == "Process killed after 5s timeout"
    assert conductor.event("stage.failed").payload["exit_code"] == -1


def test_the_last_line_counts_without_its_newline() -> None:
    conductor, _ = begin()
    conductor.end("scout", stdout=lines(SYSTEM, RESULT).rstrip(b"\n"))
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "all done"


def test_words_are_logged_and_tools_are_events() -> None:
    conductor, _ = begin()
    tool = {"type": "tool_use", "name": "Bash", "input": {"command": "ls " + "x" * 5000}}
    conductor.end(
        "scout",
        stdout=lines(says({"type": "text", "text": "Looking."}, tool), RESULT),
        stderr=b"a warning\n",
    )
    assert conductor.logged == [
        ("scout", "stdout", b"Looking.\n"),
        ("scout", "stderr", b"a warning\n"),
    ]
    used = conductor.event("agent.tool_used")
    assert used.payload["tool"] == "Bash"
    assert used.payload["input"].startswith('{"command": "ls xxx')
    assert len(used.payload["input"]) == 2000


def test_half_a_surrogate_pair_does_no_harm() -> None:
    conductor, _ = begin()
    stream = (
        b'{"type":"assistant","message":{"content":[{"type":"text","text":"a\\ud800b"},'
        b'{"type":"tool_use","name":"\\udfff","input":"\\ud800"}]}}\n'
        b'{"type":"result","result":"\\ud800"}\n'
    )
    conductor.end("scout", stdout=stream)
    assert conductor.logged == [("scout", "stdout", b"a?b\n")]
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.output == "?"
    assert conductor.event("agent.tool_used").payload == {"tool": "?", "input": '"?"'}


def test_tools_without_end_are_not_events_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "TOOL_EVENTS_LIMIT", 3)
    conductor, _ = begin()
    tool = says({"type": "tool_use", "name": "Bash", "input": {}})
    conductor.end("scout", stdout=lines(*[tool] * 10, RESULT))
    assert conductor.types().count("agent.tool_used") == 3
    assert conductor.types().count("agent.tools_cut") == 1
    assert conductor.verdict.success


def test_the_report_and_the_error_are_bounded() -> None:
    conductor, _ = begin()
    conductor.files["/workspace/output.json"] = b"\xff" * 3_000_000
    conductor.end("scout", stdout=lines(SYSTEM))
    assert conductor.verdict.report is not None
    assert len(conductor.verdict.report.output.encode()) <= REPORT_LIMIT
    conductor, _ = begin()
    conductor.end(
        "scout", stdout=lines({"type": "result", "is_error": True, "result": "é" * 160_000})
    )
    assert conductor.verdict.error is not None
    assert len(conductor.verdict.error) == ERROR_LIMIT
    assert conductor.verdict.report is not None
    assert len(conductor.verdict.report.output.encode()) <= REPORT_LIMIT


# -- from a specification ----------------------------------------------------------------------


def make(spec: dict[str, Any], **given: Any) -> Any:
    fields: dict[str, Any] = {
        "host_env": {},
        "input_text": None,
        "policy": None,
        "run_id": "r1",
        **given,
    }
    conductor = fields.pop("conductor", None) or FakeConductor()
    workload = make_workload(RunSpec.model_validate(spec), conductor, **fields)
    workload.begin()
    conductor.settle()
    return workload, conductor


def agent_run(**fields: Any) -> dict[str, Any]:
    return {"kind": "agent", "name": "scout", "agent": {"prompt": "x"}, **fields}


def test_each_kind_has_its_workload() -> None:
    assert isinstance(make(agent_run())[0], AgentTask)
    assert isinstance(make({"kind": "sandbox", "name": "box"})[0], Sandbox)
    flow = {"steps": [{"name": "a", "run": {"program": "true"}}]}
    assert isinstance(make({"kind": "workflow", "name": "f", "workflow": flow})[0], Workflow)


def test_the_sidecars_address_is_in_the_environment() -> None:
    conductor = FakeConductor(patient=True)
    begin(conductor=conductor)
    (opened,) = conductor.machines
    opened.machine.sidecar_url = "http://127.0.0.1:9"
    opened.on_ready(opened.machine)
    conductor.settle()
    assert conductor.commands["scout"].env["VOID_SIDECAR_URL"] == "http://127.0.0.1:9"


def test_messaging_brings_its_skill() -> None:
    spec = agent_run(agent={"prompt": "x", "messaging": {"enabled": True}})
    _, conductor = make(spec)
    assert "/workspace/.claude/skills/void-messaging.md" in conductor.written


def test_file_and_inline_skills_are_read_on_the_host(tmp_path: Path) -> None:
    (tmp_path / "deploy.md").write_text("# Deploy")
    skills = [f"file:{tmp_path}/deploy.md", {"name": "inline", "content": "# In"}, "agent:claude"]
    _, conductor = make(agent_run(agent={"prompt": "x", "skills": skills}))
    written = skills_written(conductor)
    assert (written["deploy.md"], written["inline.md"]) == (b"# Deploy", b"# In")


def test_the_policys_stage_timeout_reaches_the_stage() -> None:
    _, conductor = make(agent_run(), policy=Policy(stage_timeout_secs=33))
    assert conductor.commands["scout"].timeout == 33


def test_an_agent_is_given_a_placeholder_and_the_address_of_its_gateway() -> None:
    conductor = FakeConductor(patient=True)
    _, conductor = make(agent_run(), host_env={"ANTHROPIC_API_KEY": "secret"}, conductor=conductor)
    (opened,) = conductor.machines
    assert opened.request.model is not None
    assert opened.request.model.key == "secret"
    opened.machine.model_url = "http://127.0.0.1:7"
    opened.on_ready(opened.machine)
    conductor.settle()
    env = conductor.commands["scout"].env
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:7"
    assert env["ANTHROPIC_API_KEY"] == opened.request.model.token
    opened.request.model.spending.admit()
    conductor.end("scout", stdout=lines(SYSTEM, RESULT))
    assert conductor.event("model.used").payload == {
        "requests": 1,
        "refused": 0,
        "input_tokens": 0,
        "output_tokens": 0,
        "cache_tokens": 0,
    }


def test_a_pipeline_and_a_service_have_theirs_too() -> None:
    boxes = {"boxes": [{"name": "one", "prompt": "x"}]}
    assert isinstance(make({"kind": "pipeline", "name": "p", "pipeline": boxes})[0], Pipeline)
    service = {"prompt": "x", "mode": "service", "output_file": "/workspace/o"}
    workload, conductor = make(agent_run(agent=service))
    assert isinstance(workload, AgentService)
    assert conductor.commands["scout"].timeout == 0, "a service has no limit"


# -- its machine and the run's policy ----------------------------------------------------------


def test_the_stage_starts_once_the_machine_answers() -> None:
    conductor = FakeConductor(patient=True)
    begin(conductor=conductor)
    assert conductor.types() == ["stage.queued"]
    (opened,) = conductor.machines
    assert opened.request.stage is None
    opened.on_ready(opened.machine)
    conductor.settle()
    assert conductor.types() == ["stage.queued", "stage.started"]


def test_a_machine_that_is_lost_fails_the_run_with_its_words() -> None:
    conductor, _ = begin()
    conductor.machines[0].on_lost("the machine ended: killed")
    assert conductor.verdict.error == "the machine ended: killed"


def test_an_agent_that_fails_is_tried_again_on_the_same_machine_and_all_it_cost_counts() -> None:
    conductor, _ = begin(retries=1)
    conductor.end("scout", stdout=lines({**RESULT, "is_error": True}))
    assert conductor.verdicts == []
    conductor.pass_time()
    conductor.files[DEFAULT_OUTPUT_FILE] = b'{"status": "ok"}'
    conductor.end("scout", stdout=lines(SYSTEM, RESULT))
    assert len(conductor.machines) == 1
    assert conductor.event("stage.completed").payload["stage_attempt"] == 2
    report = conductor.verdict.report
    assert report is not None
    assert (report.input_tokens, report.total_cost_usd) == (140, 0.5)


def test_an_agent_owes_structured_output() -> None:
    conductor, _ = begin()
    conductor.files[DEFAULT_OUTPUT_FILE] = b'{"status": "ok"}'
    conductor.end("scout", stdout=lines(SYSTEM, RESULT))
    assert conductor.verdict.requires_output
    (output,) = conductor.outputs
    assert output.fault is None
