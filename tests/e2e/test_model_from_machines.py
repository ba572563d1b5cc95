"""A guest without a network card and without a key asks its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_model import LAST_WORDS, scripted_model
from supervisor_kit import running_supervisor
from vm_kit import BOOT_PATIENCE

from voidbus.actors.messages.runs import RunStatus
from voidbus.cli.event_line import log_text

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(300)]

KEY = "sk-ant-never-in-a-guest"
# The guest's Python has no HTTP client.
ASK = """
import os, socket
address = os.environ["ANTHROPIC_BASE_URL"].removeprefix("http://").split(":")
with socket.create_connection((address[0], int(address[1])), timeout=60) as model:
    head = f"POST /v1/messages HTTP/1.1\\r\\nHost: model\\r\\nConnection: close\\r\\n"
    key = os.environ["ANTHROPIC_API_KEY"]
    model.sendall(f"{head}x-api-key: {key}\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}".encode())
    while data := model.recv(65536):
        print(data.decode())
print(dict(os.environ))
print(sorted(os.listdir("/sys/class/net")))
open("/workspace/output.json", "w").write('{"status": "ok"}')
"""


def test_the_key_is_added_outside_of_the_guest(tmp_path: Path) -> None:
    with scripted_model() as model, running_supervisor(ANTHROPIC_API_KEY=KEY) as supervisor:
        path = tmp_path / "ask.json"
        spec = {
            "kind": "agent",
            "name": "ask",
            "sandbox": {"mode": "auto", "memory_mb": 256},
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
    assert used == {"requests": 1, "refused": 0, "input_tokens": 10, "output_tokens": 5}
