"""The documentation says what the code does: it is compared with it, name by name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from pydantic import BaseModel

from voidbus.actors.runtime.actor import Actor
from voidbus.cli.commands import ENTRIES, cli
from voidbus.spec import policy, run, supervisor
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import Message, registered

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
MESSAGES = ROOT / "docs/messages.md"
SPECIFICATION = ROOT / "docs/run-specification.md"
DOCUMENTS = sorted(
    [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
)
PACKAGES = sorted(
    path.parent
    for folder in ROOT.iterdir()
    if folder.is_dir() and folder.name not in ("tests", "bench", "build", "scripts")
    for path in folder.rglob("__init__.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)

# A path in backticks or as a link's target: it begins with a folder of ours, or is a file at the
# top. What is made at run time (`runs/R/...`, `build/tree`) is none.
_OURS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build"}
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


# -- reading markdown ------------------------------------------------------------------------


def section(document: Path, title: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    parts = re.split(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert title in found, f"{document.name} has no heading {title!r}"
    return found[title]


def tables(text: str) -> Iterator[list[str]]:
    """The rows of every table, without their heads."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("|") or re.match(r"\|[-|]+\|$", line):
            continue
        if number + 1 < len(lines) and re.match(r"\|[-|]+\|$", lines[number + 1]):
            continue
        yield [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    return _CODE.findall(cell)


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The anchor a heading gets from GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# -- what the code has -----------------------------------------------------------------------


def messages() -> dict[str, type[Message]]:
    for path in sorted((ROOT / "actors/messages").glob("*.py")):
        importlib.import_module(f"voidbus.actors.messages.{path.stem}")
    importlib.import_module("voidbus.transport.control")
    return {
        message.tag: message
        for message in registered()
        if message.__module__.startswith(("voidbus.actors.messages.", "voidbus.transport."))
    }


def parts_of(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The models in a model's fields."""

    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
            yield from parts_of(annotation)
        for argument in get_args(annotation):
            yield from inside(argument)

    for field in model.model_fields.values():
        yield from inside(field.annotation)


def fields_of(model: type[BaseModel]) -> list[str]:
    return [
        name if field.is_required() else f"{name}?" for name, field in model.model_fields.items()
    ]


def calls(folder: str) -> Iterator[ast.Call]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield node


def counter_names() -> set[str]:
    """The constant keys of `counters[...]`."""
    found = set()
    for folder in ("transport", "actors"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Subscript)
                    and ast.unparse(node.value).endswith("counters")
                    and isinstance(node.slice, ast.Constant)
                ):
                    found.add(str(node.slice.value))
    return found


def event_types() -> set[str]:
    """The first argument of every `emit(...)` and `make(...)` that is an event's name."""
    found = set()
    for call in calls("actors"):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = call.func.id if isinstance(call.func, ast.Name) else name
        first = call.args[0] if call.args else None
        if name in ("emit", "_emit", "make") and isinstance(first, ast.Constant):
            found.add(str(first.value))
    return found


def value_of(place: str) -> float:
    """The number at `transport.hub.LINKS_LIMIT`, or a default: `transport.hub.Hub(queue_limit)`."""
    path, _, argument = place.rstrip(")").partition("(")
    names_ = path.split(".")
    at = next(
        n
        for n in range(len(names_), 0, -1)
        if (ROOT / "/".join(names_[:n])).with_suffix(".py").exists()
    )
    found: Any = importlib.import_module("voidbus." + ".".join(names_[:at]))
    for name in names_[at:]:
        found = getattr(found, name)
    if not argument:
        return float(found)
    if issubclass(found, BaseModel):
        metadata = found.model_fields[argument].metadata
        bounds = [getattr(m, "le", None) or getattr(m, "max_length", None) for m in metadata]
        return float(next(bound for bound in bounds if bound is not None))
    return float(inspect.signature(found).parameters[argument].default)


# -- docs/messages.md ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """The rows of docs/messages.md's tables by the name in their first cell."""
    text = MESSAGES.read_text().partition("## Every message")[2]
    found: dict[str, list[str]] = {}
    for row in tables(text):
        name = names(row[0])
        assert name, f"docs/messages.md: the row {row} begins with no name"
        assert name[0] not in found, f"docs/messages.md has {name[0]} twice"
        found[name[0]] = row
    return found


def test_every_message_is_documented_with_its_right_and_fields(
    rows: dict[str, list[str]],
) -> None:
    for tag, message in messages().items():
        assert tag in rows, f"docs/messages.md lacks {tag}"
        right = message.right.name.lower() if message.right is not None else "-"
        right += ", command" if message.changes else ""
        assert rows[tag][1] == right, f"{tag}: its right is {right}"
        assert names(rows[tag][2]) == fields_of(message), f"{tag}: its fields are others"


def test_every_part_of_a_message_is_documented_with_its_fields(
    rows: dict[str, list[str]],
) -> None:
    for message in messages().values():
        for part in parts_of(message):
            if issubclass(part, Message):
                continue  # it has a row of its own
            assert part.__name__ in rows, f"docs/messages.md lacks {part.__name__}"
            assert names(rows[part.__name__][1]) == fields_of(part), part.__name__


def test_no_message_is_documented_that_is_not_there(rows: dict[str, list[str]]) -> None:
    known = set(messages())
    parts = {part.__name__ for message in messages().values() for part in parts_of(message)}
    events = set(event_types()) | {row for row in rows if row.startswith("sidecar.")}
    assert set(rows) <= known | parts | events


def test_every_fault_is_documented_and_no_other() -> None:
    documented = [names(row[0])[0] for row in tables(section(MESSAGES, "Faults"))]
    assert documented == [reason.value for reason in FaultReason]


def test_every_counter_is_documented_and_no_other() -> None:
    documented = {names(row[0])[0] for row in tables(section(MESSAGES, "Counters"))}
    in_code = {name for name in counter_names() if not name.startswith("fault_")}
    assert documented == in_code | {"fault_REASON"}


@pytest.mark.parametrize(
    ("document", "title"),
    [
        (MESSAGES, "Limits"),
        (ROOT / "docs/http-api.md", "Limits"),
        (ROOT / "docs/agents.md", "Limits"),
        (ROOT / "docs/agents.md", "Bounds"),
        (ROOT / "docs/agents.md", "Bounds of the gateway"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_every_limit_is_what_the_code_has(document: Path, title: str) -> None:
    for what, number, place in tables(section(document, title)):
        assert float(number) == value_of(names(place)[0]), what


def test_every_actor_is_documented_with_its_mailbox() -> None:
    for path in sorted((ROOT / "actors").glob("*.py")):
        importlib.import_module(f"voidbus.actors.{path.stem}")
    importlib.import_module("voidbus.gateway.actor")
    documented = {row[0]: row for row in tables(section(MESSAGES, "Mailboxes"))}
    actors = {actor.__name__: actor for actor in _subclasses(Actor) if _is_ours(actor)}
    assert set(documented) == set(actors)
    for name, (_, _, limit, overflow, control) in documented.items():
        assert int(limit) == actors[name].mailbox_limit, name
        assert overflow == actors[name].overflow.value, name
        assert set(names(control)) == {message.tag for message in actors[name].control}, name


def test_every_event_of_a_run_is_documented() -> None:
    from voidbus.actors.sidecar import _NOTED

    documented = {names(row[0])[0] for row in tables(section(MESSAGES, "Events of a run"))}
    noted = {f"sidecar.{kind}" for kind in _NOTED}
    assert event_types() <= documented
    assert documented <= event_types() | noted


def _subclasses(kind: type[Actor]) -> Iterator[type[Actor]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _is_ours(actor: type[Actor]) -> bool:
    module = actor.__module__
    return module.startswith("voidbus.") and not module.startswith("voidbus.actors.runtime.")


# -- docs/run-specification.md ---------------------------------------------------------------

SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": run.RunSpec,
    "sandbox": run.SandboxSpec,
    "mounts": run.MountSpec,
    "llm": run.LlmSpec,
    "agent": run.AgentSpec,
    "messaging": run.MessagingSpec,
    "workflow": run.WorkflowSpec,
    "steps": run.StepSpec,
    "run": run.StepRun,
    "pipeline": run.PipelineSpec,
    "boxes": run.BoxSpec,
    "Policy": policy.Policy,
}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_field_of_a_specification_is_documented_with_its_default(title: str) -> None:
    documented = {names(row[0])[0]: row for row in tables(section(SPECIFICATION, title))}
    model = SECTIONS[title]
    assert list(documented) == [field.alias or name for name, field in model.model_fields.items()]
    for name, field in model.model_fields.items():
        # A policy is numbers only, so its table names no types.
        cell = documented[name][1 if model is policy.Policy else 2]
        if field.is_required():
            assert cell == "required", f"{title}: {name}"
        elif isinstance(field.default, str | int | bool):
            shown = str(field.default)
            assert names(cell) == [shown.lower() if shown in ("True", "False") else shown], name


def test_the_sections_of_a_specification_are_all_documented() -> None:
    """Those with a table are checked above; the small ones at least name their fields."""
    text = SPECIFICATION.read_text()
    for model in set(parts_of(run.RunSpec)) - set(SECTIONS.values()):
        for name, field in model.model_fields.items():
            assert f"`{field.alias or name}`" in text or f"{name}:" in text, (model, name)


def test_every_field_of_the_supervisors_configuration_is_documented() -> None:
    documented = {
        names(row[0])[0]: names(row[1])[-1]
        for row in tables(section(SPECIFICATION, "The supervisor's configuration"))
    }
    in_code = dict(_leaves(supervisor.SupervisorConfig, ""))
    assert list(documented) == list(in_code)
    for name, default in in_code.items():
        if isinstance(default, bool):
            assert documented[name] == str(default).lower(), name
        elif isinstance(default, float | int):
            assert float(documented[name]) == default, name
        elif isinstance(default, str):
            assert documented[name] == default, name


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, object]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default


# -- paths, links, packages, commands --------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_named_in_a_document_exists(document: Path) -> None:
    for text in _CODE.findall(prose(document)):
        path = text.split()[0].partition("::")[0]
        top = path.partition("/")[0]
        is_file_at_the_top = "/" not in path and re.fullmatch(r"[A-Z]+\.md|pyproject\.toml", path)
        if (top in _OURS and "/" in path) or is_file_at_the_top:
            assert (ROOT / path).exists(), f"{document.name} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_a_document_leads_somewhere(document: Path) -> None:
    for target, fragment in _LINK.findall(prose(document)):
        if "://" in target:
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{document.name} links to {target}"
        if fragment:
            headings = {anchor(heading) for heading in _HEADING.findall(path.read_text())}
            assert fragment[1:] in headings, f"{document.name} links to {target}{fragment}"


def test_the_code_map_lists_every_package() -> None:
    listed = {
        names(row[1])[0]: names(row[0])[0] for row in tables(section(ARCHITECTURE, "Code map"))
    }
    folders = [path.relative_to(ROOT).as_posix() for path in PACKAGES]
    assert listed == {f"voidbus.{folder.replace('/', '.')}": f"{folder}/" for folder in folders}


def test_every_command_of_the_readmes_quick_start_exists() -> None:
    block = re.search(r"```bash\n(.*?)```", section(README, "Quick start"), re.DOTALL)
    assert block is not None
    for line in block[1].splitlines():
        check_command(line.rstrip(" &").split())


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "voidbus":
        command: click.Command = cli
        with click.Context(cli) as context:
            while isinstance(command, click.Group):
                found = command.get_command(context, rest.pop(0))
                assert found is not None, " ".join(words)
                command = found
            known = {option for each in command.params for option in each.opts}
        for word in rest:
            if word.startswith("-"):
                assert word in known, f"{' '.join(words)}: no option {word}"
            elif "/" in word:
                assert (ROOT / word).exists(), f"{' '.join(words)}: no file {word}"
    elif "/" in program:
        assert (ROOT / program).stat().st_mode & 0o111, program
    else:
        assert program == "source" or shutil.which(program), program


def test_the_readme_lists_every_command_an_operator_has_every_day() -> None:
    listed = set()
    for row in tables(section(README, "Everyday commands")):
        words = names(row[0])[0].split()
        check_command([word for word in words if not word.isupper()])
        listed.add(words[1])
    # These two are for once: what is installed, and a shell's set-up.
    assert listed == set(ENTRIES) - {"version", "completion"}


def test_no_document_has_tabs_or_blanks_at_the_end_of_a_line() -> None:
    for document in DOCUMENTS:
        for number, line in enumerate(document.read_text().splitlines(), 1):
            assert line == line.rstrip(), f"{document.name}:{number} ends in blanks"
            assert "\t" not in line, f"{document.name}:{number} holds a tab"
