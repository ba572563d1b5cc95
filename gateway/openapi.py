"""The API's description, written from the table of routes and the models of its bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from voidbus.gateway.problems import Code, ErrorBody, Problem
from voidbus.gateway.router import Route

_REF = "#/components/schemas/{model}"
# What any request may get, whatever its route.
_ALWAYS = (Code.UNAUTHORIZED, Code.INTERNAL_ERROR, Code.RETRIEVAL_TIMEOUT)


def describe(routes: Sequence[Route], release: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    models = _models(routes)
    references, definitions = models_json_schema(
        [(model, "serialization") for model in models]
        + [(route.body, "validation") for route in routes if route.body is not None]
        + [(ErrorBody, "serialization")],
        ref_template=_REF,
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if route.tag == "fallback":
            continue
        method = "get" if route.method == "*" else route.method.lower()
        operation = _operation(route, references)
        paths.setdefault(route.template, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "voidbus",
            "version": release,
            "description": "Runs AI agents in micro-VMs. Every error has the body ErrorBody.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # A Unix socket asks for no token; TCP does.
        "security": [{"token": []}, {}],
    }


def _models(routes: Sequence[Route]) -> list[type[BaseModel]]:
    found: dict[type[BaseModel], None] = {}
    for route in routes:
        if isinstance(route.answer, type) and issubclass(route.answer, BaseModel):
            found[route.answer] = None
        elif isinstance(route.answer, tuple):
            found[route.answer[0]] = None
    return list(found)


def _operation(route: Route, references: Any) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.handler.__name__}",
        "tags": [route.tag],
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {
            "200": {
                "description": route.summary,
                "content": _content(route, references),
            }
        },
    }
    for code in (*route.problems, *_ALWAYS):
        problem = Problem(code, "")
        known = operation["responses"].setdefault(
            str(problem.status),
            {
                "description": "",
                "content": {"application/json": {"schema": references[ErrorBody, "serialization"]}},
            },
        )
        known["description"] = ", ".join(filter(None, [known["description"], code.value]))
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": references[route.body, "validation"]}},
        }
        operation["responses"]["413"] = {"description": "The body is over 4 MiB; no body."}
    return operation


def _content(route: Route, references: Any) -> dict[str, Any]:
    answer = route.answer
    if isinstance(answer, str):
        return {media.strip(): {"schema": {}} for media in answer.split(",")}
    if isinstance(answer, tuple):  # a list of a model
        items = references[answer[0], "serialization"]
        return {"application/json": {"schema": {"type": "array", "items": items}}}
    return {"application/json": {"schema": references[answer, "serialization"]}}


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{([a-z_]+)\}", route.template)
    ]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {
            "name": query.name,
            "in": "query",
            "required": False,
            "description": query.description,
            "schema": dict(query.schema),
        }
        for query in route.query
    ]
