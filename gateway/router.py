"""From a request to its handler: a table of routes, which is also what /openapi.json is made of."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from aiohttp import web
from pydantic import BaseModel, ValidationError

from voidbus.actors.messages.file_content import no_number
from voidbus.gateway.problems import Code, Problem

if TYPE_CHECKING:
    from voidbus.gateway.api import Api

B = TypeVar("B", bound=BaseModel)

MAX_BODY = 4 * 1024 * 1024
"""Bytes of a request's body, at most."""


@dataclass(frozen=True)
class Call:
    """One request: what its path and its query say, and its body once it is asked for."""

    api: Api
    request: web.BaseRequest
    params: Mapping[str, str]

    def header(self, name: str) -> str | None:
        """A header; bytes that are no UTF-8 are replaced."""
        text = self.request.headers.get(name)
        return None if text is None else text.encode(errors="replace").decode()

    def query(self, name: str) -> str | None:
        """A parameter of the query; the first where there are several."""
        return self.request.rel_url.query.get(name)

    def query_number(self, name: str, default: int) -> int:
        """A whole number of 0 or more. Raises Problem for anything else."""
        text = self.query(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit()) or len(text) > 18:
            raise Problem(Code.INVALID_PARAMS, f"{name} must be a whole number, not {text[:80]!r}")
        return int(text)

    async def body(self) -> bytes:
        """The whole body. Raises Problem where it takes too long, and aiohttp's own exception
        where it is too large."""
        seconds = self.api.patience.body
        try:
            async with asyncio.timeout(seconds):
                return await self.request.read()
        except TimeoutError:
            raise Problem(
                Code.INVALID_PARAMS, f"the body was not here within {seconds:g} s", 408
            ) from None

    async def json(self, code: Code) -> Any:
        """The body as JSON; bytes that are no UTF-8 are replaced. Raises Problem with `code`."""
        text = (await self.body()).decode(errors="replace")
        try:
            value = json.loads(text, parse_constant=no_number)
            if "\\u" in text:  # half a character may have been written so, which none can keep
                json.dumps(value, ensure_ascii=False).encode()
            return value
        except RecursionError:
            raise Problem(code, "invalid JSON: it nests too deeply") from None
        except ValueError as error:
            raise Problem(code, f"invalid JSON: {error}") from None

    async def model(self, model: type[B], code: Code) -> B:
        """The body as a model. Raises Problem with `code`, naming the fields that are wrong."""
        value = await self.json(code)
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise Problem(code, f"invalid JSON: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """What is wrong with which fields."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)[:5]
    )


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Query:
    """A parameter of a route's query, for the document."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True)
class Route:
    """A method and a path, and what the document says of them. `method` "*" is any. A parameter
    that ends in `:path` may have slashes. `answer` is a model, a media type, or both by status."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[BaseModel] | str | Any
    body: type[BaseModel] | None = None
    query: Sequence[Query] = ()
    problems: Sequence[Code] = ()
    tag: str = "runs"

    @property
    def pattern(self) -> re.Pattern[str]:
        def part(match: re.Match[str]) -> str:
            name, _, kind = match[1].partition(":")
            return f"(?P<{name}>{'.+' if kind == 'path' else '[^/]+'})"

        return re.compile(re.sub(r"\{([a-z_:]+)\}", part, self.path) + r"\Z")

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it."""
        return re.sub(r":path\}", "}", self.path)


class Router:
    """Finds the route of a request: the first in the table that fits."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._patterns = [(route, route.pattern) for route in routes]
        # Most requests are for these: no pattern is tried.
        self._plain = {
            (route.method, route.path): route for route in routes if "{" not in route.path
        }

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route and the path's parameters, percent-decoded."""
        wanted = "GET" if method == "HEAD" else method
        plain = self._plain.get((wanted, path))
        if plain is not None:
            return plain, {}
        for route, pattern in self._patterns:
            if route.method not in (wanted, "*"):
                continue
            match = pattern.match(path)
            if match is not None:
                return route, {
                    name: unquote(text, errors="replace")
                    for name, text in match.groupdict().items()
                }
        return None
