"""Two agents, each in a machine of its own, and an orchestrator that carries what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_kit import ApiHouse, write_spec
from http_kit import HttpClient
from vm_kit import machine_processes

BOOT = 120.0
ITERATIONS = 3
AGENTS = ("left", "right")

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(400)]


class Orchestrator:
    """Moves the intents of one iteration into the inboxes of the next, as clients of void-box do:
    by the HTTP API alone."""

    def __init__(self, api: HttpClient, spec: Path) -> None:
        self._api = api
        self._spec = spec
        self.said: dict[str, list[dict[str, Any]]] = {name: [] for name in AGENTS}

    def iterate(self, iteration: int) -> dict[str, dict[str, Any]]:
        """One run for each agent, at the same time; what each has left."""
        runs = {name: self._start(name, iteration) for name in AGENTS}
        ended = {name: self._api.wait_end(run_id, BOOT) for name, run_id in runs.items()}
        outputs = {}
        for name, run in ended.items():
            assert (run["status"], run["error"]) == ("succeeded", None), (name, iteration)
            path = f"/v1/runs/{run['id']}/intents"
            self.said[name] = self._api.get(path).json
            assert self._api.get(path).json == [], "they are taken once"
            (result,) = run["artifact_publication"]["manifest"]
            outputs[name] = self._api.get(result["retrieval_path"]).json
        return outputs

    def _start(self, name: str, iteration: int) -> str:
        run_id = self._api.start(self._spec, run_id=f"{name}-{iteration}")
        self._api.wait_type(run_id, "sidecar.started", patience=BOOT)
        entries = [
            {
                "message_id": intent["intent_id"],
                "from_candidate_id": peer,
                "kind": intent["kind"],
                "payload": intent["payload"],
            }
            for peer in AGENTS
            for intent in self.said[peer]
            if peer != name
        ]
        inbox = {
            "execution_id": "swarm",
            "candidate_id": name,
            "iteration": iteration,
            "entries": entries,
        }
        assert self._api.put(f"/v1/runs/{run_id}/inbox", inbox).json == {"ok": True}
        return run_id


def test_two_agents_in_two_machines_hear_each_other_over_three_iterations(
    house: ApiHouse, tcp: HttpClient, tmp_path: Path
) -> None:
    spec = write_spec(
        tmp_path,
        "agent",
        name="candidate",
        sandbox={
            "mode": "qemu",
            "memory_mb": 256,
            "env": {"CLAUDIO_TURNS": "1", "CLAUDIO_INTENTS": "2"},
        },
        llm={"provider": "claude"},
        agent={"prompt": "do it", "messaging": {"enabled": True}},
    )
    orchestrator = Orchestrator(tcp, spec)
    heard: dict[str, list[str]] = {name: [] for name in AGENTS}
    for iteration in range(1, ITERATIONS + 1):
        outputs = orchestrator.iterate(iteration)
        assert {name: outputs[name]["inbox_seen"] for name in AGENTS} == heard
        ids = {n: [intent["intent_id"] for intent in orchestrator.said[n]] for n in AGENTS}
        assert [len(each) for each in ids.values()] == [2, 2]
        heard = {"left": ids["right"], "right": ids["left"]}
    assert machine_processes(house.supervisor) == []
