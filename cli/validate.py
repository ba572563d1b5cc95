"""`voidbus validate`, and the check that `voidbus run` begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.output import note, plain_lines, print_json, say
from voidbus.spec.loader import load_run_spec
from voidbus.spec.problem import Problem, SpecError


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the fields of docs/cli.md.")
def validate(files: tuple[Path, ...], as_json: bool) -> int:
    """Check run specifications without starting anything. Needs no supervisor."""
    documents = []
    ok = True
    for file in files:
        problems, digest = _problems(file)
        wrong = digest is None
        ok = ok and not wrong
        documents.append(
            {
                "file": str(file),
                "ok": not wrong,
                "digest": digest,
                "problems": [_document(problem) for problem in problems],
            }
        )
        if not as_json:
            for problem in problems:
                note(plain_lines(_line(problem)))
            if not wrong:
                say(f"{file}: ok")
    if as_json:
        print_json({"ok": ok, "files": documents})
    return ExitCode.OK if ok else ExitCode.USAGE


def check_file(file: Path) -> None:
    """Print a specification's warnings. Raises Failure (2), after its errors, where it is bad."""
    problems, digest = _problems(file)
    for problem in problems:
        note(plain_lines(_line(problem)))
    if digest is None:
        count = sum(problem.level == "error" for problem in problems)
        raise Failure(
            f"{file} has {count} error{'s' if count != 1 else ''}; nothing was started",
            ExitCode.USAGE,
        )


def _problems(file: Path) -> tuple[tuple[Problem, ...], str | None]:
    """What is wrong with a file; its digest where nothing is that would stop it."""
    try:
        loaded = load_run_spec(file)
    except SpecError as error:
        return error.problems, None
    return tuple(loaded.warnings), loaded.digest


def _line(problem: Problem) -> str:
    """`FILE:LINE:COL: [warning: ]FIELD: what is wrong`."""
    if problem.level != "warning":
        return str(problem)
    place = f"{problem.position}: "
    return f"{place}warning: {str(problem).removeprefix(place)}"


def _document(problem: Problem) -> dict[str, Any]:
    return {
        "level": problem.level,
        "line": problem.line,
        "column": problem.column,
        "field": problem.field,
        "message": problem.message,
        "found": problem.found,
        "allowed": problem.allowed,
        "suggestion": problem.suggestion,
    }
