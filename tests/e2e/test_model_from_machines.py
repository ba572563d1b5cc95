"""A guest without a network card and without a key asks its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from guest_vm import eventually
from patience import SLOW
from scripted_model import LAST_WORDS, scripted_model
from supervisor_kit import PATIENCE, running_supervisor
from vm_kit import BOOT_PATIENCE, guest_memory, machine_processes

from voidbus.actors.messages.runs import RunStatus
from voidbus.cli.event_line import log_text
from voidbus.vm.machine import Machine

pytestmark = pytest.mark.timeout(300 * SLOW)

KEY = "sk-ant-never-in-a-guest"
# The guest's Python has no HTTP client.
ASK = """
import os, socket, sys
address = os.environ["ANTHROPIC_BASE_URL"].removeprefix("http://").split(":")
with socket.create_connection((address[0], int(address[1])), timeout=60) as model:
    head = f"POST /v1/messages HTTP/1.1\\r\\nHost: model\\r\\nConnection: close\\r\\n"
    key = os.environ["ANTHROPIC_API_KEY"]
    model.sendall(f"{head}x-api-key: {key}\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}".encode())
    while data := model.recv(65536):
        print(data.decode())
print(dict(os.environ))
print(sorted(os.listdir("/sys/class/net")))
sys.stdout.flush()
if os.environ.get("WAIT"):
    import time
    print("waiting", flush=True)
    time.sleep(600)
open("/workspace/output.json", "w").write('{"status": "ok"}')
"""


def test_the_key_is_added_outside_of_the_guest(kind: type[Machine], tmp_path: Path) -> None:
    with scripted_model() as model, running_supervisor(ANTHROPIC_API_KEY=KEY) as supervisor:
        path = tmp_path / "ask.json"
        spec = {
            "kind": "agent",
            "name": "ask",
            "sandbox": {"mode": kind.name, "memory_mb": 256},
            "llm": {"provider": "claude", "base_url": model.url, "max_requests": 1},
            "agent": {"prompt": "x", "command": {"program": "python3", "args": ["-c", ASK]}},
        }
        path.write_text(json.dumps(spec))
        with supervisor.connect() as client:
            run_id = client.start(path)
            state = client.wait_end(run_id, BOOT_PATIENCE)
            events = client.events(run_id)
    said = "\n".join(text for event in events if (text := log_text(event)) is not None)
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None), said
    assert LAST_WORDS in said
    assert "['lo']" in said, "there is no card"
    assert KEY not in "".join(event.model_dump_json() for event in events)
    ((_, headers, _),) = model.requests
    assert headers["x-api-key"] == KEY
    (used,) = [event.payload for event in events if event.event_type == "model.used"]
    assert used == {
        "requests": 1,
        "refused": 0,
        "input_tokens": 10,
        "output_tokens": 5,
        "cache_tokens": 0,
    }


def test_the_key_is_nowhere_in_the_guests_memory_nor_in_what_is_kept(
    kind: type[Machine], tmp_path: Path
) -> None:
    with scripted_model() as model, running_supervisor(ANTHROPIC_API_KEY=KEY) as supervisor:
        path = tmp_path / "ask.json"
        spec = {
            "kind": "agent",
            "name": "ask",
            "sandbox": {"mode": kind.name, "memory_mb": 256, "env": {"WAIT": "1"}},
            "llm": {"provider": "claude", "base_url": model.url},
            "agent": {"prompt": "x", "command": {"program": "python3", "args": ["-c", ASK]}},
        }
        path.write_text(json.dumps(spec))
        with supervisor.connect() as client:
            run_id = client.start(path)
            # It has asked the model, with what it has for a key; its disk is in its memory.
            client.wait_for(run_id, lambda event: log_text(event) == "waiting", BOOT_PATIENCE)
            (machine,) = machine_processes(supervisor)
            found = memory_with(machine, (KEY.encode(), b"x-api-key: voidbus-"))
            client.cancel(run_id)
            client.wait_end(run_id, BOOT_PATIENCE)
        ((_, headers, _),) = model.requests
        assert headers["x-api-key"] == KEY
        assert found == {b"x-api-key: voidbus-"}, "the placeholder is, and the key is not"
        folder = supervisor.state_dir / "runs" / run_id
        assert eventually(lambda: not folder.exists(), PATIENCE), "its files are put by"
        kept = [each for each in supervisor.state_dir.rglob("*") if each.is_file()]
        assert kept
        assert [str(each) for each in kept if KEY.encode() in each.read_bytes()] == []
        assert KEY not in supervisor.log


def memory_with(machine: int, wanted: tuple[bytes, ...]) -> set[bytes]:
    """Which of these byte strings are anywhere in the memory of a process's guest."""
    found: set[bytes] = set()
    with Path(f"/proc/{machine}/mem").open("rb") as memory:
        for start, size in guest_memory(machine):
            memory.seek(start)
            content = memory.read(size)
            found |= {text for text in wanted if text in content}
    return found
