"""What a run process logs, in `process.log` of its run's directory."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from supervisor_kit import PATIENCE, agent_spec, running_supervisor


@pytest.mark.parametrize(("level", "logged"), [("debug", True), ("info", False)])
def test_a_run_process_logs_as_much_as_its_supervisor(
    tmp_path: Path, level: str, logged: bool
) -> None:
    with (
        running_supervisor(VOIDBUS_LOG__LEVEL=level) as supervisor,
        supervisor.connect() as client,
    ):
        run_id = client.start(agent_spec(tmp_path, CLAUDIO_HANG="1"))
        started = client.wait_type(run_id, "sidecar.started")
        url = f"http://{(started.payload or {})['address']}/v1/health"
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            assert answer.status == 200
        log = supervisor.state_dir / "runs" / run_id / "process.log"
        assert ("DEBUG voidbus.actors: sidecar.health_served" in log.read_text()) is logged
        client.cancel(run_id, grace=0.0)
        client.wait_end(run_id)
