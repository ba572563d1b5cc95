"""A tree of nodes to a model: pydantic's errors and unknown fields as problems with positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from voidbus.spec.node import Node
from voidbus.spec.problem import Level, Location, Problem, field_path, nearest

Model = TypeVar("Model", bound=BaseModel)

# Problems past these are noise, and each costs a line.
MAX_PROBLEMS = 100

_MESSAGES = {
    "missing": "is required",
    "string_type": "must be text",
    "path_type": "must be a path",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "tuple_type": "must be a list",
    "literal_error": "is not one of the values allowed",
    "union_tag_invalid": "is not one of the values allowed",
    "union_tag_not_found": "is required",
    "greater_than": "is out of range",
    "greater_than_equal": "is out of range",
    "less_than_equal": "is out of range",
}
# Values under these are never shown: they are, or are easily mistaken for, secrets.
_PRIVATE = frozenset({"env", "api_key_env"})


def validate(model: type[Model], root: Node, unknown: Level) -> tuple[Model | None, list[Problem]]:
    """The model, or None when there are errors, with every problem found. `unknown` is how bad a
    field the model doesn't know is."""
    root, found, errors = _attempt(model, root)
    problems: list[Problem] = []
    explained: set[Location] = set()
    strangers = list(islice(_unknown_fields(model, root, ()), MAX_PROBLEMS))
    problems.extend(
        _problem(error, root, strangers, explained)
        for error in errors[:MAX_PROBLEMS]
        if error["type"] != "extra_forbidden"
    )
    for location, candidates in strangers:
        if location not in explained:
            problems.append(_stranger(root, location, candidates, unknown))
    problems.sort(key=lambda problem: (problem.line, problem.column))
    failed = any(problem.level == "error" for problem in problems)
    return (None if failed else found), problems


def _attempt(model: type[Model], root: Node) -> tuple[Node, Model | None, list[ErrorDetails]]:
    """Validates; where text is wanted and an unquoted scalar stands (`PORT: 8080`), its source
    text is taken instead, as the format's other readers do."""
    errors: list[ErrorDetails] = []
    # Twice, because an error at one level can hide one below; the third pass only reports.
    for _ in range(3):
        try:
            return root, model.model_validate(root.plain()), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
        texts: dict[Location, Node] = {}
        for error_ in errors:
            location = _location(error_)
            node = root.at(location)
            if error_["type"] in ("string_type", "path_type") and node and _is_text(node):
                texts[location] = Node(node.position, value=node.text)
        if not texts:
            break
        root = root.with_values(texts)
    return root, None, errors


def _is_text(node: Node) -> bool:
    """A number or a boolean does for text, and so does nothing at all (`KEY:`); a spelt-out null
    doesn't."""
    return node.text is not None and (node.value is not None or node.text == "")


def _location(error: ErrorDetails) -> Location:
    """Pydantic's location without the names of union members (a skill's form in angle brackets,
    a stage's type after its index)."""
    location = error["loc"]
    kept: list[str | int] = []
    for at, part in enumerate(location):
        if isinstance(part, str) and part.startswith("<"):
            continue
        is_stage_type = part in ("box", "fan_out") and at >= 2 and location[at - 2] == "stages"
        if not is_stage_type:
            kept.append(part)
    return tuple(kept)


def _problem(
    error: ErrorDetails,
    root: Node,
    strangers: Sequence[tuple[Location, Sequence[str]]],
    explained: set[Location],
) -> Problem:
    location = _location(error)
    kind, context = error["type"], error.get("ctx", {})
    message = _MESSAGES.get(kind, error["msg"])
    if kind == "missing":
        wanted = str(location[-1])
        for place, _ in strangers:
            if place[:-1] == location[:-1] and nearest(str(place[-1]), [wanted]):
                explained.add(place)
                misspelt = f"'{str(place[-1])[:60]}'"
                position = root.key_position_of(place)
                return Problem(position, field_path(location), message, misspelt, None, wanted)
        return Problem(root.position_of(location), field_path(location), message)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "type")
    node = root.at(location)
    found = None
    if node is not None and not kind.startswith("skill"):
        found = _shown(node, private=not _PRIVATE.isdisjoint(location))
    allowed, choices = _allowed(context)
    suggestion = None
    if node is not None and isinstance(node.value, str) and choices:
        suggestion = nearest(node.value, choices)
    position = root.position_of(location)
    return Problem(position, field_path(location), message, found, allowed, suggestion)


def _shown(node: Node, *, private: bool) -> str:
    if node.entries is not None:
        return "a mapping"
    if node.items is not None:
        return "a list"
    if node.value is None:
        return "nothing"
    if private:
        return "a value not shown"
    text = repr(node.value) if node.text is None else repr(node.text)
    return text if len(text) <= 60 else text[:57] + "..."


def _allowed(context: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    choices: list[str] = []
    expected = context.get("allowed") or context.get("expected_tags") or context.get("expected")
    if isinstance(expected, tuple):
        choices = [str(choice) for choice in expected]
    elif isinstance(expected, str):
        choices = [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]
    if choices:
        return ", ".join(choices), choices
    for bound, words in (("ge", "at least"), ("le", "at most"), ("gt", "more than")):
        if bound in context:
            return f"{words} {context[bound]}", []
    return None, []


def _stranger(root: Node, location: Location, candidates: Sequence[str], level: Level) -> Problem:
    name = str(location[-1])
    suggestion = nearest(name, candidates)
    allowed = None if suggestion else ", ".join(candidates)
    message = "unknown field" if level == "error" else "unknown field, ignored"
    position = root.key_position_of(location)
    return Problem(position, field_path(location), message, None, allowed, suggestion, level)


def _unknown_fields(
    annotation: Any, node: Node, location: Location
) -> Iterator[tuple[Location, tuple[str, ...]]]:
    """Fields of `node` that the type doesn't know, with the names it does know. Works on the types
    and not on a validated model, so it finds misspellings where validation failed."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _unknown_fields(arguments[0], node, location)
    elif origin in (Union, UnionType):
        chosen = _member(arguments, node)
        if chosen is not None:
            yield from _unknown_fields(chosen, node, location)
    elif origin is tuple and node.items is not None:
        for index, item in enumerate(node.items):
            yield from _unknown_fields(arguments[0], item, (*location, index))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {
            field.alias or name: field.annotation for name, field in annotation.model_fields.items()
        }
        for key, entry in (node.entries or {}).items():
            if key in fields:
                yield from _unknown_fields(fields[key], entry.node, (*location, key))
            else:
                yield (*location, key), tuple(fields)


def _member(members: Sequence[Any], node: Node) -> Any | None:
    """The member of a union a mapping was meant to be: the one whose required fields are there,
    else the one with most fields in common; of equals the first."""
    if node.entries is None:
        return next((member for member in members if get_origin(member) is tuple), None)
    keys = node.entries.keys()

    def likeness(model: type[BaseModel]) -> tuple[bool, int]:
        fields = model.model_fields
        required = {name for name, field in fields.items() if field.is_required()}
        return required <= keys, len(fields.keys() & keys)

    models = [model for model in map(_bare, members) if model is not None]
    return max(models, key=likeness, default=None)


def _bare(member: Any) -> type[BaseModel] | None:
    if get_origin(member) is Annotated:
        member = get_args(member)[0]
    return member if isinstance(member, type) and issubclass(member, BaseModel) else None
