"""Bad specifications of every kind: refused with their place and the way out, nothing started."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor

Voidbus = Callable[..., Any]

FLOW = "kind: workflow\nname: w\nsandbox: {mode: mock}\nworkflow:\n"


@dataclass(frozen=True)
class Bad:
    """A bad file, and what is said of it behind its name: place, field and what is wrong."""

    name: str
    content: str | bytes
    said: str
    line: int = 0  # the whole file
    column: int = 0
    field: str = ""
    suggestion: str | None = None


BAD = [
    Bad(
        "huge.yaml",
        bytes(50 * 1024 * 1024),
        ": too large (found 52428800 bytes; allowed at most 1048576 bytes)",
    ),
    Bad(
        "deep.yaml",
        "kind: agent\nname: x\nagent: " + "[" * 80 + "]" * 80,
        ":3:71: nested too deeply (allowed at most 64 levels)",
        *(3, 71),
    ),
    Bad(
        "deep.json",
        '{"kind": ' + "[" * 100_000,
        ":1:73: nested too deeply (allowed at most 64 levels)",
        *(1, 73),
    ),
    Bad(
        "prose.yaml",
        "kind: agent\nname: [\n",
        ":3:1: not YAML: while parsing a flow node, did not find expected node content",
        *(3, 1),
    ),
    Bad(
        "binary.yaml",
        b"\xff\xfe\x00",
        ":1:1: not UTF-8; save the file as UTF-8 (found byte 0xff)",
        *(1, 1),
    ),
    Bad(
        "types.yaml",
        "kind: sandbox\nname: s\nsandbox:\n  mode: mock\n  memory_mb: lots\n",
        ":5:14: sandbox.memory_mb: must be a whole number (found 'lots')",
        *(5, 14, "sandbox.memory_mb"),
    ),
    Bad(
        "list.yaml",
        FLOW + "  steps: none\n",
        ":5:10: workflow.steps: must be a list (found 'none')",
        *(5, 10, "workflow.steps"),
    ),
    Bad(
        "value.yaml",
        "kind: agnt\nname: x\n",
        ":1:7: kind: is not one of the values allowed (found 'agnt'; allowed agent, pipeline, "
        "workflow, sandbox). Did you mean 'agent'?",
        *(1, 7, "kind", "agent"),
    ),
    Bad(
        "field.yaml",
        FLOW + "  steps:\n    - name: a\n      run: {progam: 'true'}\n",
        ":7:13: workflow.steps[0].run.program: is required (found 'progam'). "
        "Did you mean 'program'?",
        *(7, 13, "workflow.steps[0].run.program", "program"),
    ),
]


@pytest.fixture
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Bad]:
    case: Bad = request.param
    path = tmp_path / case.name
    path.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    return path, case


every_bad_one = pytest.mark.parametrize("bad", BAD, indirect=True, ids=[each.name for each in BAD])


@every_bad_one
@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_bad_specification_exits_with_2_says_where_and_starts_nothing(
    voidbus: Voidbus, state: Path, command: str, bad: tuple[Path, Bad]
) -> None:
    path, case = bad
    result = voidbus(command, path)
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert lines[0] == f"{path}{case.said}"
    if command == "run":
        assert lines[1:] == [f"voidbus: error: {path} has 1 error; nothing was started"]
    else:
        assert lines[1:] == []
    assert not state.exists(), "no supervisor was started for it"


@every_bad_one
def test_a_bad_specification_reaches_no_supervisor(
    voidbus: Voidbus, supervisor: FakeSupervisor, bad: tuple[Path, Bad]
) -> None:
    path, _ = bad
    assert voidbus("run", path, "--detach").code == 2
    assert supervisor.asked == []


@every_bad_one
def test_a_bad_specifications_place_and_way_out_are_fields_of_the_json(
    voidbus: Voidbus, bad: tuple[Path, Bad]
) -> None:
    path, case = bad
    result = voidbus("validate", path, "--json")
    assert result.code == 2
    document = json.loads(result.out)
    assert document["ok"] is False
    [file] = document["files"]
    assert (file["file"], file["ok"], file["digest"]) == (str(path), False, None)
    [problem] = file["problems"]
    assert problem["level"] == "error"
    assert (problem["line"], problem["column"]) == (case.line, case.column)
    assert (problem["field"], problem["suggestion"]) == (case.field, case.suggestion)


def test_a_misspelt_field_that_may_be_left_out_is_a_warning_with_the_nearest_one(
    voidbus: Voidbus, tmp_path: Path
) -> None:
    path = tmp_path / "almost.yaml"
    path.write_text(
        FLOW + "  steps:\n    - name: a\n      dependson: []\n      run: {program: 'true'}\n"
    )
    result = voidbus("validate", path)
    assert (result.code, result.out) == (0, f"{path}: ok\n")
    assert result.err == (
        f"{path}:7:7: warning: workflow.steps[0].dependson: unknown field, ignored. "
        "Did you mean 'depends_on'?\n"
    )
