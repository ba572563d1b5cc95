"""Reading specifications: places, suggestions, limits, and anything at all as input."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voidbus.spec.document import MAX_BYTES, Format
from voidbus.spec.levels import CircularDependency, dependency_levels, output_step_of
from voidbus.spec.loader import load_run_spec, parse_run_spec
from voidbus.spec.problem import Problem, SpecError
from voidbus.spec.run import RunSpec, StepRun, StepSpec, WorkflowSpec
from voidbus.spec.skill import InlineSkill, McpSkill, OciSkill, ReferenceSkill

CONFIGS = Path(__file__).parents[2] / "configs"
AGENT = "kind: agent\nname: n\nagent:\n  prompt: p\n"


def problems(text: str | bytes, format: Format = "yaml") -> tuple[Problem, ...]:  # noqa: A002
    with pytest.raises(SpecError) as caught:
        parse_run_spec(text, name="x", format=format)
    return caught.value.problems


@pytest.mark.parametrize(
    "path",
    sorted(each for each in CONFIGS.iterdir() if each.name != "supervisor.yaml"),
    ids=lambda path: path.name,
)
def test_every_example_loads_without_a_warning(path: Path) -> None:
    loaded = load_run_spec(path)
    assert loaded.warnings == ()
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert RunSpec.model_validate_json(loaded.spec.model_dump_json(by_alias=True)) == loaded.spec


def test_defaults_are_those_of_the_format() -> None:
    spec = parse_run_spec(AGENT + "sandbox:\n", name="x", format="yaml").spec
    assert (spec.api_version, spec.sandbox.mode, spec.sandbox.memory_mb) == ("v1", "auto", 1024)
    assert (spec.sandbox.vcpus, spec.sandbox.network) == (1, False)
    assert spec.agent is not None
    assert (spec.agent.mode, spec.agent.messaging.enabled) == ("task", False)


def test_skills_are_read_in_every_form() -> None:
    text = AGENT + (
        "  skills:\n"
        "  - file:a:b.md\n"
        "  - {image: i, mount: /m}\n"
        "  - {command: c, args: [1], env: {K: 2}}\n"
        "  - {name: n, content: c}\n"
        "  - {image: i, command: c}\n"
    )
    loaded = parse_run_spec(text, name="x", format="yaml")
    assert loaded.spec.agent is not None
    assert loaded.spec.agent.skills == (
        ReferenceSkill(type="file", value="a:b.md"),
        OciSkill(image="i", mount="/m", readonly=True),
        McpSkill(command="c", args=("1",), env={"K": "2"}),
        InlineSkill(name="n", content="c"),
        McpSkill(command="c"),
    )
    assert [each.field for each in loaded.warnings] == ["agent.skills[4].image"]


def test_unquoted_scalars_do_for_text_and_nothing_is_the_empty_text() -> None:
    text = AGENT + "sandbox:\n  env:\n    A: 8080\n    B: no\n    C:\n    D: 1:30\n    E: 010\n"
    env = parse_run_spec(text, name="x", format="yaml").spec.sandbox.env
    assert env == {"A": "8080", "B": "no", "C": "", "D": "1:30", "E": "010"}


def test_a_misspelt_field_is_a_warning_with_its_place_and_neighbour() -> None:
    loaded = parse_run_spec(AGENT + "  timeout_sec: 4\n", name="f.yaml", format="yaml")
    assert [str(each) for each in loaded.warnings] == [
        "f.yaml:5:3: agent.timeout_sec: unknown field, ignored. Did you mean 'timeout_secs'?"
    ]


def test_a_misspelt_required_field_is_told_at_the_misspelling() -> None:
    (problem,) = problems("kind: agent\nname: n\nagent:\n  promt: p\n")
    assert str(problem) == (
        "x:4:3: agent.prompt: is required (found 'promt'). Did you mean 'prompt'?"
    )


def test_a_wrong_value_is_told_with_its_place_and_what_is_allowed() -> None:
    (problem,) = problems(AGENT + "sandbox:\n  memory_mb: 8\n")
    expected = "x:6:14: sandbox.memory_mb: is out of range (found '8'; allowed at least 16)"
    assert str(problem) == expected
    (problem,) = problems(AGENT + "  mode: servce\n")
    assert (problem.line, problem.column, problem.suggestion) == (5, 9, "service")
    (problem,) = problems('{"kind": "sandbox",\n\t"name": 5}', "json")
    assert (problem.line, problem.column, problem.message) == (2, 10, "must be text")


def test_the_value_of_a_variable_is_never_shown() -> None:
    text = '{"kind": "sandbox", "name": "n", "sandbox": {"env": {"KEY": 123454321}}}'
    (problem,) = problems(text, "json")
    assert "123454321" not in str(problem)
    assert problem.field == "sandbox.env.KEY"


BAD: dict[str, tuple[str | bytes, Format, str]] = {
    "empty": ("", "yaml", "the file is empty"),
    "only a comment": ("# nothing", "yaml", "the file is empty"),
    "empty JSON": ("  ", "json", "the file is empty"),
    "a list": ("- a", "yaml", "the top level must be a mapping"),
    "a word": ("a", "yaml", "the top level must be a mapping"),
    "not UTF-8": (b"kind: \xff", "yaml", "not UTF-8; save the file as UTF-8"),
    "a surrogate": ("\ud800", "yaml", "not text: half of a surrogate pair"),
    "duplicate": ("a: 1\na: 2", "yaml", "duplicate field, first given on line 1"),
    "duplicate JSON": ('{"a":1,\n"a":2}', "json", "duplicate field, first given on line 1"),
    "two documents": ("a: 1\n---\nb: 2", "yaml", "more than one document; keep one a file"),
    "a tag": (
        "a: !!python/name:os.system x",
        "yaml",
        "YAML tags are not used here; remove the tag",
    ),
    "own anchor": ("a: &a [*a]", "yaml", "anchor 'a' contains itself"),
    "deep YAML": ("[" * 100_000, "yaml", "nested too deeply"),
    "deep keys": ("? " * 100_000, "yaml", "a field name must be text"),
    "a list for a key": ("a: &a [x]\n*a : 1", "yaml", "a field name must be text"),
    "deep JSON": ('{"a":' * 100_000, "json", "nested too deeply"),
    "a NUL": ('a: "\\0"', "yaml", "text can't hold a NUL character"),
    "too large": (" " * (MAX_BYTES + 1), "yaml", "too large"),
    "a digit flood": ('{"a": ' + "9" * 5000 + "}", "json", "a number with too many digits"),
    "NaN": ('{"a": NaN}', "json", "not JSON: a value was expected"),
    "alias bomb": (
        "a0: &a0 [x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 20)),
        "yaml",
        "too many values (aliases count each time they are used)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_specification_is_refused_with_a_reason(case: str) -> None:
    text, format_, message = BAD[case]
    (problem,) = problems(text, format_)
    assert problem.message == message
    assert problem.line >= 1 or case == "too large"


def test_files_that_cant_be_read_are_refused_with_a_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(50 * 1024 * 1024)
    for path, message in (
        (tmp_path, "is a directory; name the file in it"),
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path / "pipe.yaml", "is not a regular file"),
        (tmp_path / "huge.yaml", "too large"),
        (Path("a\0b"), "can't be opened: not a file name"),
        (tmp_path / ("x" * 300), "can't be opened: File name too long"),
    ):
        with pytest.raises(SpecError) as caught:
            load_run_spec(path)
        assert [each.message for each in caught.value.problems] == [message]


def test_the_extension_chooses_the_format(tmp_path: Path) -> None:
    for name in ("a.YAML", "a.Yml"):
        (tmp_path / name).write_text("kind: sandbox\nname: n\n")
        assert load_run_spec(tmp_path / name).spec.kind == "sandbox"
    (tmp_path / "a.txt").write_text('\ufeff{"kind": "sandbox", "name": "n"}')
    assert load_run_spec(tmp_path / "a.txt").spec.name == "n"


def outcome(text: str | bytes, form: Format) -> RunSpec | SpecError:
    try:
        return parse_run_spec(text, name="x", format=form).spec
    except SpecError as error:
        return error


def is_sound(result: RunSpec | SpecError) -> bool:
    return isinstance(result, RunSpec) or (bool(result.errors) and bool(str(result)))


FORMATS: st.SearchStrategy[Format] = st.sampled_from(["yaml", "json"])


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)), FORMATS)
def test_any_input_gives_a_specification_or_a_spec_error(text: str | bytes, form: Format) -> None:
    assert is_sound(outcome(text, form))


KEYS = (
    "kind",
    "name",
    "agent",
    "prompt",
    "skills",
    "sandbox",
    "env",
    "workflow",
    "steps",
    "run",
    "pipeline",
    "boxes",
    "stages",
    "type",
    "image",
    "command",
    "depends_on",
    "llm",
    "provider",
    "mounts",
    "inputs",
    "from",
    "<oci>",
    "box",
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(JUNK, FORMATS)
def test_any_structure_gives_a_specification_or_a_spec_error(data: object, form: Format) -> None:
    assert is_sound(outcome(json.dumps(data), form))


YAML_PIECES = st.sampled_from(
    [
        "a: ",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        "&x ",
        "*x",
        "? ",
        "! ",
        "|\n",
        ">-",
        '"',
        "'",
        "#",
        "---\n",
        "...",
        "%YAML 1.3\n",
        "<<: ",
        "kind: agent\n",
        "name: n\n",
        ",",
        ":",
        "\t",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(YAML_PIECES, max_size=30))
def test_any_yaml_syntax_gives_a_specification_or_a_spec_error(pieces: list[str]) -> None:
    assert is_sound(outcome("".join(pieces), "yaml"))


def test_a_problem_prints_as_one_safe_line() -> None:
    text = '{"kind": "sandbox", "name": "n", "a\\u001b[2J\\n": 1, "api_version": "v2"}'
    lines = [str(each) for each in problems(text, "json")]
    assert all(line.isprintable() for line in lines)
    (problem,) = problems(AGENT + "  skills: ['x" + "y" * 5000 + ":z']\n")
    assert len(str(problem)) <= 1000


def step(name: str, *needs: str) -> StepSpec:
    return StepSpec(name=name, run=StepRun(program="sh"), depends_on=needs)


def test_levels_keep_the_declared_order() -> None:
    steps = [step("d", "b", "c"), step("c", "a"), step("b", "a"), step("a"), step("e")]
    levels = [[each.name for each in level] for level in dependency_levels(steps)]
    assert levels == [["a", "e"], ["c", "b"], ["d"]]


def test_the_output_step_is_the_named_the_only_sink_or_the_last() -> None:
    chain = (step("a"), step("b", "a"))
    assert output_step_of(WorkflowSpec(steps=chain, output_step="a")) == "a"
    assert output_step_of(WorkflowSpec(steps=chain)) == "b"
    assert output_step_of(WorkflowSpec(steps=(step("a"), step("b"), step("c", "a")))) == "c"


def test_a_cycle_is_told_at_a_step_on_it_and_not_behind_it() -> None:
    with pytest.raises(CircularDependency, match=r"at step '[bc]'"):
        dependency_levels([step("x", "b"), step("b", "c"), step("c", "b")])


def test_a_long_chain_of_steps_is_ordered() -> None:
    steps = [step("0"), *(step(str(n), str(n - 1)) for n in range(1, 5000))]
    assert len(dependency_levels(steps[::-1])) == 5000
