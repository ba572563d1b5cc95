"""A model's key is not in the guest, the journal, the events or the logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_kit import House, agent
from scripted_model import scripted_model
from supervisor_kit import running_supervisor

from voidbus.actors.messages.runs import RunStatus
from voidbus.spec.loader import load_run_spec

KEY = "sk-ant-search-for-this-everywhere"
# Prints its environment and the files of its guest.
LOOK = (
    "env; "
    'echo "{\\"status\\": \\"ok\\"}" > output.json; grep -rs "" /workspace /home/sandbox | head -50'
)


def files_with(text: str, folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if text.encode() in path.read_bytes()]


def looking(**llm: Any) -> dict[str, Any]:
    spec = agent()
    spec["llm"] = {"provider": "claude", **llm}
    spec["agent"]["command"] = {"program": "sh", "args": ["-c", LOOK]}
    return spec


def test_the_key_is_nowhere_in_a_run(house: House) -> None:
    house.start(looking(), host_env={"ANTHROPIC_API_KEY": KEY})
    house.wait_for(lambda event: "ANTHROPIC_BASE_URL=http://127.0.0.1:" in event.message)
    state = house.wait_over()
    assert state.status == RunStatus.SUCCEEDED
    assert KEY not in "".join(event.model_dump_json() for event in house.events())
    assert files_with(KEY, house.folder) == []
    assert any(line.startswith("ANTHROPIC_API_KEY=voidbus-") for line in house.log())


def test_the_key_is_in_the_guest_only_where_the_specification_says_so(house: House) -> None:
    house.start(looking(key_in_guest=True), host_env={"ANTHROPIC_API_KEY": KEY})
    house.wait_over()
    assert f"ANTHROPIC_API_KEY={KEY}" in house.log()


@pytest.mark.timeout(120)
def test_the_key_is_in_no_file_of_a_supervisor_and_its_run_processes(tmp_path: Path) -> None:
    with scripted_model() as model, running_supervisor(ANTHROPIC_API_KEY=KEY) as supervisor:
        path = tmp_path / "look.yaml"
        ask = (
            "import json, os, urllib.request as u; r = u.Request("
            "os.environ['ANTHROPIC_BASE_URL'] + '/v1/messages', b'{\\\"messages\\\": []}', "
            "{'x-api-key': os.environ['ANTHROPIC_API_KEY']}); print(u.urlopen(r).read()); "
            "open('output.json', 'w').write('{\\\"status\\\": \\\"ok\\\"}')"
        )
        path.write_text(
            f"kind: agent\nname: look\nsandbox: {{mode: mock}}\n"
            f"llm: {{provider: claude, base_url: '{model.url}'}}\n"
            f'agent: {{prompt: x, command: {{program: python3, args: ["-c", "{ask}"]}}}}\n'
        )
        load_run_spec(path)
        with supervisor.connect() as client:
            run_id = client.start(path)
            state = client.wait_end(run_id)
            assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
            used = [e for e in client.events(run_id) if e.event_type == "model.used"]
        assert used[0].payload is not None
        assert used[0].payload["requests"] == 1
        assert model.requests[0][1]["x-api-key"] == KEY, "it was used"
        assert files_with(KEY, supervisor.state_dir) == []
    assert KEY not in supervisor.log
