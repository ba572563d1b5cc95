"""Reads a run specification: every problem at once, each with its place, before anything starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from voidbus.spec.document import Format, format_of, parse_document, read_bytes
from voidbus.spec.node import Node
from voidbus.spec.problem import Position, Problem, SpecError, field_path
from voidbus.spec.rules import BrokenRule, broken_rules
from voidbus.spec.run import RunSpec
from voidbus.spec.validation import MAX_PROBLEMS, validate


@dataclass(frozen=True, slots=True)
class LoadedRunSpec:
    """A usable specification. `digest` is the SHA-256 of its bytes, in hex."""

    spec: RunSpec
    warnings: tuple[Problem, ...]
    digest: str


def load_run_spec(path: Path) -> LoadedRunSpec:
    """The specification in a file: `.yaml` and `.yml` are YAML, all else JSON.

    Raises SpecError, and nothing else, whatever the path leads to and the file holds.
    """
    return parse_run_spec(read_bytes(path), name=str(path), format=format_of(path))


def parse_run_spec(text: str | bytes, *, name: str, format: Format) -> LoadedRunSpec:  # noqa: A002 - the word for it
    """The specification in `text`, called `name` in problems. Raises SpecError and nothing else."""
    if isinstance(text, str):
        try:
            text = text.encode()
        except UnicodeEncodeError:
            problem = Problem(Position(name, 1, 1), "", "not text: half of a surrogate pair")
            raise SpecError([problem]) from None
    root = parse_document(text, source=name, format=format)
    spec, problems = validate(RunSpec, root, "warning")
    if spec is not None:
        problems += [_problem(root, rule) for rule in islice(broken_rules(spec), MAX_PROBLEMS)]
        problems.sort(key=lambda problem: (problem.line, problem.column))
    if spec is None or any(problem.level == "error" for problem in problems):
        raise SpecError(problems)
    return LoadedRunSpec(spec, tuple(problems), hashlib.sha256(text).hexdigest())


def _problem(root: Node, rule: BrokenRule) -> Problem:
    return Problem(
        root.position_of(rule.location),
        field_path(rule.location),
        rule.message,
        rule.found,
        rule.allowed,
        rule.suggestion,
        rule.level,
    )
