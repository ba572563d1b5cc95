"""What an agent's skills come to in its guest, and in which order."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from actor_kit import PATIENCE
from conductor_kit import FakeConductor
from run_kit import House, agent

from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.workloads.make import make_workload
from voidbus.actors.workloads.mcp_servers import MAX_DEATHS, RESTART_FIRST_SECONDS
from voidbus.spec.policy import Policy
from voidbus.spec.run import RunSpec
from voidbus.vm.guest.descendants import descendants

SKILLS = "/workspace/.claude/skills"


def run(
    skills: list[Any],
    *,
    base: Path = Path(),
    messaging: dict[str, Any] | None = None,
    llm: dict[str, Any] | None = None,
    conductor: FakeConductor | None = None,
    retries: int = 0,
    sandbox: dict[str, Any] | None = None,
) -> FakeConductor:
    conductor = conductor or FakeConductor()
    agent = {"prompt": "x", "skills": skills, "messaging": messaging or {}}
    spec = {"kind": "agent", "name": "scout", "llm": llm, "agent": agent, "sandbox": sandbox or {}}
    workload = make_workload(
        RunSpec.model_validate(spec),
        conductor,
        run_id="r1",
        host_env={},
        input_text=None,
        policy=Policy(max_stage_retries=retries),
        base=base,
    )
    workload.begin()
    conductor.settle()
    return conductor


def ready(conductor: FakeConductor, name: str) -> None:
    conductor.end(f"mcp {name} ready")


def servers(conductor: FakeConductor) -> set[str]:
    ours = (stage for stage in conductor.commands if stage.startswith("mcp "))
    return {stage.removeprefix("mcp ") for stage in ours if not stage.endswith(" ready")}


# -- files -------------------------------------------------------------------------------------


def test_a_missing_file_is_an_error_that_names_the_skill_before_a_machine_is_asked_for(
    tmp_path: Path,
) -> None:
    conductor = FakeConductor()
    with pytest.raises(ValueError, match=r"skill file:no\.md: .* can't be read: No such file"):
        run(["file:no.md"], base=tmp_path, conductor=conductor)
    assert conductor.machines == []


def test_a_skill_that_cannot_be_written_fails_the_run_by_its_name() -> None:
    conductor = FakeConductor()
    conductor.write_errors[f"{SKILLS}/notes.md"] = "disk full"
    run([{"name": "notes", "content": "x"}], conductor=conductor)
    assert conductor.verdict.error == (
        f"skill notes: cannot write {SKILLS}/notes.md in the guest: disk full"
    )


def test_a_skill_in_a_folder_of_its_own_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "review").mkdir()
    (tmp_path / "review/SKILL.md").write_text("# Review")
    conductor = run(["file:review/SKILL.md"], base=tmp_path)
    assert conductor.written[f"{SKILLS}/review/SKILL.md"] == b"# Review"


@pytest.mark.parametrize(
    ("value", "file", "where"),
    [
        ("o/r", "r.md", "o/r/main/SKILL.md"),
        ("o/r/lint", "lint.md", "o/r/main/skills/lint/SKILL.md"),
    ],
)
def test_a_remote_skill_is_fetched(value: str, file: str, where: str) -> None:
    conductor = FakeConductor()
    conductor.remote[f"https://raw.githubusercontent.com/{where}"] = b"# Lint"
    run([f"remote:{value}"], conductor=conductor)
    folder = file.removesuffix(".md")
    assert conductor.written[f"{SKILLS}/{file}"] == b"# Lint"
    assert conductor.written[f"{SKILLS}/{folder}/SKILL.md"] == b"# Lint"
    assert conductor.stages_running() == ["scout"]


def test_a_remote_skill_that_cannot_be_had_fails_the_run_by_its_name() -> None:
    conductor = run(["remote:o/r/lint"])
    assert conductor.stages_running() == []
    error = conductor.verdict.error or ""
    assert error.startswith("skill remote:o/r/lint: ")
    assert "o/r/main/skills/lint/SKILL.md" in error


def test_codex_finds_skills_where_it_looks() -> None:
    conductor = run([{"name": "notes", "content": "x"}], llm={"provider": "codex"})
    assert conductor.written["/workspace/.agents/skills/notes/SKILL.md"] == b"x"


@pytest.mark.parametrize("image", ["/srv/tools:1", "here/tools", "oci:/srv/tools@sha256:ab"])
def test_an_image_is_the_machines_and_a_script_puts_its_programs_on_path(image: str) -> None:
    conductor = run([{"image": image, "mount": "/my tools/"}])
    (opened,) = conductor.machines
    assert opened.request.images == ((image, "/my tools/"),)
    script = conductor.written[f"{SKILLS}/tools_path.sh"].decode()
    assert script == """export PATH='/my tools/bin':"$PATH"\n"""
    assert "skill.warning" not in conductor.types()


def test_a_mock_machine_has_no_images_and_that_is_told() -> None:
    conductor = run([{"image": "tools:1", "mount": "/tools"}], sandbox={"mode": "mock"})
    (opened,) = conductor.machines
    assert opened.request.images == ()
    assert "not mounted" in conductor.event("skill.warning").message
    assert conductor.stages_running() == ["scout"]


# -- MCP servers -------------------------------------------------------------------------------


def test_servers_are_started_after_the_files_and_the_agent_once_they_all_accept() -> None:
    conductor = run(
        ["mcp:tracker", {"command": "/opt/search", "args": ["--fast"], "env": {"K": "v"}}]
    )
    assert f"{SKILLS}/x.md" not in conductor.written
    assert servers(conductor) == {"tracker", "search"}
    tracker, search = conductor.commands["mcp tracker"], conductor.commands["mcp search"]
    assert (tracker.program, tracker.args) == ("tracker", ("--sse", "--port", "8222"))
    assert (search.program, search.args) == ("/opt/search", ("--fast", "--sse", "--port", "8223"))
    assert search.env == {"K": "v"}
    assert tracker.background
    assert tracker.timeout == 0
    assert "/workspace/.mcp.json" in conductor.written, "it is there before a server is"
    ready(conductor, "search")
    assert "scout" not in conductor.commands
    ready(conductor, "tracker")
    assert conductor.commands["scout"].args[-2:] == ("--mcp-config", "/workspace/.mcp.json")
    assert json.loads(conductor.written["/workspace/.mcp.json"]) == {
        "mcpServers": {
            "tracker": {"type": "http", "url": "http://127.0.0.1:8222/mcp"},
            "search": {"type": "http", "url": "http://127.0.0.1:8223/mcp"},
        }
    }


def test_servers_of_one_name_are_told_apart() -> None:
    assert servers(run(["mcp:search", {"command": "/opt/search"}])) == {"search", "search-2"}


def test_a_server_that_ends_before_it_is_ready_fails_the_run_with_its_last_words() -> None:
    conductor = run(["mcp:tracker"])
    conductor.end("mcp tracker", 1, stderr=b"no such database\n")
    assert conductor.verdict.error == (
        "skill mcp:tracker: the MCP server did not start: it ended with exit code 1 before it was "
        "ready; its last words: no such database"
    )
    assert "scout" not in conductor.commands
    conductor.end("mcp tracker ready", 1)
    assert len(conductor.verdicts) == 1


def test_a_server_that_never_accepts_fails_the_run() -> None:
    conductor = run(["mcp:tracker"])
    conductor.end("mcp tracker ready", 1)
    assert conductor.verdict.error is not None
    assert "did not accept connections within 60 s" in conductor.verdict.error


def test_a_server_that_dies_is_started_again_and_both_are_events() -> None:
    conductor = run(["mcp:tracker"])
    ready(conductor, "tracker")
    conductor.end("mcp tracker", 139, stderr=b"segfault\n")
    exited = conductor.event("mcp.exited")
    assert (exited.level, exited.stage) == ("warn", "scout")
    assert exited.payload == {
        "server": "tracker",
        "exit_code": 139,
        "deaths": 1,
        "stderr": "segfault",
    }
    assert conductor.delays[-1] == RESTART_FIRST_SECONDS
    conductor.pass_time()
    ready(conductor, "tracker")
    assert conductor.event("mcp.restarted").payload == {"server": "tracker", "deaths": 1}
    assert conductor.verdicts == []


def test_a_server_that_dies_too_often_is_left_alone_and_the_run_goes_on() -> None:
    conductor = run(["mcp:tracker"])
    ready(conductor, "tracker")
    for death in range(1, MAX_DEATHS + 1):
        conductor.end("mcp tracker", 1)
        assert conductor.types().count("mcp.exited") == death
        if death < MAX_DEATHS:
            conductor.later.pop()()  # the pause before it is started again is over
        conductor.running = [each for each in conductor.running if "ready" not in each.stage]
    assert conductor.event("mcp.given_up").payload == {"server": "tracker"}
    assert conductor.delays[1:] == [0.2, 0.4, 0.8, 1.6]
    assert conductor.stages_running() == ["scout"]
    conductor.end("scout", stdout=b'{"type":"result","result":"x"}\n')
    assert conductor.verdict.success


def test_what_a_probe_of_an_earlier_life_says_does_not_count() -> None:
    conductor = run(["mcp:tracker"])
    ready(conductor, "tracker")
    conductor.end("mcp tracker", 1)
    conductor.pass_time()
    late = next(each for each in conductor.running if each.stage == "mcp tracker ready")
    conductor.end("mcp tracker", 1)
    conductor.running.append(late)
    conductor.end("mcp tracker ready")
    assert "mcp.restarted" not in conductor.types()


def test_an_agent_that_is_tried_again_finds_its_servers_there() -> None:
    conductor = run(["mcp:tracker"], retries=1)
    ready(conductor, "tracker")
    conductor.end("scout", 1, stdout=b'{"type":"system"}\n')
    conductor.pass_time()
    assert sorted(conductor.stages_running()) == ["mcp tracker", "scout"]


# -- messaging ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bridge", "provider", "skills", "offered"),
    [
        (None, None, [], True),
        (None, "claude", [], True),
        (None, "ollama", [], False),
        (None, "codex", [], True),
        ("claude", "ollama", [], True),
        ("claude-code", "ollama", [], True),
        ("claude_channels", "ollama", [], False),
        (None, "ollama", ["agent:claude-code"], True),
        (None, "ollama", ["agent:claude"], True),
        (None, "ollama", ["cli:claude"], False),
        (None, None, ["mcp:void-mcp"], True),
    ],
)
def test_messaging_brings_its_skill_and_its_tools_to_who_can_use_them(
    bridge: str | None, provider: str | None, skills: list[str], offered: bool
) -> None:
    messaging = {"enabled": True, "provider_bridge": bridge}
    llm = None if provider is None else {"provider": provider}
    conductor = run([*skills], messaging=messaging, llm=llm)
    assert f"{SKILLS}/void-messaging.md" in conductor.written
    assert servers(conductor) == ({"void-mcp"} if offered else set())


def test_without_messaging_there_are_no_tools_for_it() -> None:
    assert servers(run([])) == set()


# -- in a real guest ---------------------------------------------------------------------------


def test_an_agent_finds_its_skill_and_calls_the_tools_of_its_mcp_server(house: House) -> None:
    house.start(agent(CLAUDIO_MCP="1", CLAUDIO_INTENTS="0"))
    assert house.wait_over().status == RunStatus.SUCCEEDED
    tools = [e.message for e in house.events() if e.event_type == "agent.tool_used"]
    assert [tool for tool in tools if tool.startswith("mcp__")] == [
        "mcp__void-mcp__read_peer_messages",
        "mcp__void-mcp__broadcast_observation",
        "mcp__void-mcp__recommend_to_leader",
    ]
    assert "Skills: void-messaging." in house.log()
    assert house.desk is not None
    intents = [(each.kind, each.audience) for each in house.desk.state.peek()]
    assert intents == [("signal", "broadcast"), ("proposal", "leader")]


def serving(house: House) -> list[int]:
    """Pids of the processes below this run's machine that serve MCP."""
    below = descendants(house.machine_pid())
    return [pid for pid in below if b"--sse" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_server_of_a_real_guest_is_started_again_when_it_is_killed(house: House) -> None:
    spec = agent()
    spec["agent"]["command"] = {"program": "sh", "args": ["-c", "echo up; sleep 60"]}
    house.start(spec)
    house.wait_message("up")
    (server,) = serving(house)
    os.kill(server, signal.SIGKILL)
    exited = house.wait_type("mcp.exited")
    assert exited.payload is not None
    assert exited.payload["server"] == "void-mcp"
    house.wait_type("mcp.restarted")
    house.cancel(grace=0.1)
    assert house.wait_over().status == RunStatus.CANCELLED


def test_a_cancelled_run_does_not_wait_for_its_servers(house: House) -> None:
    """One that ignores SIGTERM would hold it for the whole grace."""
    spec = agent()
    spec["agent"]["command"] = {"program": "sh", "args": ["-c", "echo up; sleep 60"]}
    deaf = 'trap \'\' TERM; void-mcp "$@"; void-mcp "$@"'
    spec["agent"]["skills"] = [{"command": "sh", "args": ["-c", deaf, "deaf"]}]
    house.start(spec, grace=PATIENCE * 2)
    house.wait_message("up")
    assert len(serving(house)) > 1
    house.cancel()
    assert house.wait_over().status == RunStatus.CANCELLED


def test_a_server_that_is_not_there_fails_the_run_by_its_name(house: House) -> None:
    spec = agent(messaging=False)
    spec["agent"]["skills"] = ["mcp:nowhere"]
    house.start(spec)
    state = house.wait_over()
    assert state.status == RunStatus.FAILED
    assert (state.error or "").startswith(
        "skill mcp:nowhere: the MCP server did not start: could not start 'nowhere'"
    )


def test_a_command_of_any_kind_is_an_agent(house: House) -> None:
    spec = agent(messaging=False)
    script = 'read first; echo "was told: $first"; echo \'{"status": "ok"}\' > output.json'
    spec["agent"]["command"] = {"program": "sh", "args": ["-c", script]}
    house.start(spec)
    state = house.wait_over()
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
    assert state.report is not None
    assert state.report.output == "was told: do it"
