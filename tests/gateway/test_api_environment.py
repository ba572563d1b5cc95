"""What the supervisor's environment says about runs, by both doors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_kit import LEAVE_OUTPUT, ApiHouse, api_house, pipeline, step, workflow, write_spec
from http_kit import HttpClient
from scripted_model import ScriptedModel, scripted_model

# An agent with Claude Code's command line that asks its model once, naming the one it was told of.
_ASKING = f"""#!{sys.executable}
import json, os, sys, urllib.request

model = sys.argv[sys.argv.index("--model") + 1]
request = urllib.request.Request(
    os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages",
    json.dumps({{"model": model}}).encode(),
    {{"x-api-key": os.environ["ANTHROPIC_API_KEY"]}},
)
with urllib.request.urlopen(request, timeout=30) as answer:
    answer.read()
print(json.dumps({{"type": "result", "result": "asked"}}))
with open("output.json", "w") as output:
    output.write('{{"status": "ok"}}')
"""
OF_SPEC = {"OLLAMA_BASE_URL": "http://of-the-specification", "PLACE": "", "NOWHERE": ""}


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with scripted_model() as served:
        yield served


@pytest.fixture(scope="module")
def house(model: ScriptedModel) -> Iterator[ApiHouse]:
    with api_house(
        VOIDBOX_LLM_PROVIDER="custom",
        VOIDBOX_LLM_MODEL="the-hosts",
        VOIDBOX_LLM_BASE_URL=model.url,
        VOIDBOX_LLM_API_KEY_ENV="KEY_OF_HOST",
        KEY_OF_HOST="key-of-the-host",
        KEY_OF_BOX="key-of-the-box",
        OLLAMA_BASE_URL="http://of-the-host",
        PLACE="of-the-host",
    ) as built:
        yield built


@pytest.fixture
def asking(tmp_path: Path) -> dict[str, Any]:
    """What makes an agent or a box one that asks its model."""
    program = tmp_path / "asking"
    program.write_text(_ASKING)
    program.chmod(0o755)
    return {"prompt": "ask", "program": str(program)}


def asked(model: ScriptedModel) -> list[tuple[str, str]]:
    """Which model was asked for and with which key, each time since this was looked at."""
    found = [(body["model"], headers["x-api-key"]) for _, headers, body in model.requests]
    model.requests.clear()
    return found


def test_the_environments_llm_stands_over_the_runs(
    api: HttpClient, model: ScriptedModel, tmp_path: Path, asking: dict[str, Any]
) -> None:
    # One that nobody serves: had it been asked, the run would fail.
    llm = {"provider": "ollama", "model": "own", "base_url": "http://127.0.0.1:9"}
    for fields in ({}, {"llm": llm}):
        run = api.finish(write_spec(tmp_path, "agent", agent=asking, **fields))
        assert (run["status"], run["error"]) == ("succeeded", None)
    assert asked(model) == [("the-hosts", "key-of-the-host")] * 2


def test_the_environments_llm_does_not_stand_over_a_boxs_own(
    api: HttpClient, model: ScriptedModel, tmp_path: Path, asking: dict[str, Any]
) -> None:
    llm = {
        "provider": "custom",
        "model": "the-boxs",
        "base_url": model.url,
        "api_key_env": "KEY_OF_BOX",
    }
    boxes = ({"name": "p", **asking, "llm": llm}, {"name": "q", **asking})
    run = api.finish(pipeline(tmp_path, *boxes))
    assert (run["status"], run["error"]) == ("succeeded", None)
    assert asked(model) == [("the-boxs", "key-of-the-box"), ("the-hosts", "key-of-the-host")]


SHOW = 'echo "$OLLAMA_BASE_URL|$PLACE|$NOWHERE"'


@pytest.mark.parametrize("kind", ["agent", "pipeline", "workflow"])
def test_what_a_run_leaves_empty_is_taken_from_the_environment_and_ollamas_address_always(
    api: HttpClient, tmp_path: Path, kind: str
) -> None:
    sandbox = {"mode": "mock", "env": OF_SPEC}
    shell = {"prompt": "x", "command": {"program": "sh", "args": ["-c", f"{SHOW}; {LEAVE_OUTPUT}"]}}
    if kind == "agent":
        spec = write_spec(tmp_path, "agent", sandbox=sandbox, agent=shell)
    elif kind == "pipeline":
        spec = pipeline(tmp_path, {"name": "p", **shell, "sandbox": {"env": OF_SPEC}})
    else:
        spec = workflow(tmp_path, step("a", SHOW), sandbox=sandbox)
    run = api.finish(spec)
    assert run["report"]["output"].strip() == "http://of-the-host|of-the-host|"


def test_a_sandboxs_variables_are_passed_as_they_are(api: HttpClient, tmp_path: Path) -> None:
    # A sandbox is shown to run programs by `echo`; this one says what it was given.
    echo = tmp_path / "echo"
    echo.write_text(f"#!/bin/sh\n{SHOW}\n")
    echo.chmod(0o755)
    env = {**OF_SPEC, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    run_id = api.start(write_spec(tmp_path, "sandbox", sandbox={"mode": "mock", "env": env}))
    api.wait_log(run_id, "http://of-the-specification||")
    api.post(f"/v1/runs/{run_id}/cancel")
