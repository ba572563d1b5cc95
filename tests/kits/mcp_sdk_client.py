"""The official SDK's client, told what to do by lines on standard input.

Runs under the Python of the SDK's own environment, never under ours: there `mcp` is the SDK.
A line says how to connect, or is a step of the connection, the last of which is "end". Each is
answered with one line: what came of it. Importing the SDK takes seconds, so one process serves many
connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

# By name, since to the type checker `mcp` would be the folder beside us.
sdk: Any = importlib.import_module("mcp")
session_module: Any = importlib.import_module("mcp.client.session")
IS_FIRST = not hasattr(sdk, "Client")  # of the SDK's two generations
Fault: Any = sdk.McpError if IS_FIRST else sdk.MCPError

PATIENCE = 20.0


class Driver:
    """A connected client, and the notifications it was sent."""

    def __init__(self, client: Any, told: asyncio.Queue[dict[str, Any]]) -> None:
        self.client = client
        self.told = told
        self.calls: dict[str, asyncio.Task[Any]] = {}
        self.streams = contextlib.AsyncExitStack()
        self.listening: Any = None

    async def info(self) -> Any:
        server = self.client.server_info
        return {
            "version": self.client.protocol_version,
            "name": None if server is None else server.name,
            "capabilities": dumped(self.client.server_capabilities),
            "instructions": self.client.instructions,
        }

    async def list_tools(self) -> Any:
        return await self.client.list_tools()

    async def list_resources(self) -> Any:
        return await self.client.list_resources()

    async def list_templates(self) -> Any:
        return await self.client.list_resource_templates()

    async def read(self, uri: str) -> Any:
        return await self.client.read_resource(uri, cache_mode="bypass")

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return await self.client.call_tool(name, arguments)

    async def ping(self) -> Any:
        return await self.client.send_ping()

    async def level(self, level: str) -> Any:
        return await self.client.set_logging_level(level)

    async def subscribe(self, uri: str) -> Any:
        return await self.client.subscribe_resource(uri)

    async def unsubscribe(self, uri: str) -> Any:
        return await self.client.unsubscribe_resource(uri)

    async def next_told(self) -> Any:
        return await self.told.get()

    async def listen(self, uri: str) -> Any:
        stream = self.client.listen(resource_subscriptions=[uri])
        self.listening = await self.streams.enter_async_context(stream)
        return dumped(self.listening.honored)

    async def next_event(self) -> Any:
        async for event in self.listening:
            return {"type": type(event).__name__, "uri": event.uri}
        return None

    async def begin(self, label: str, name: str, arguments: dict[str, Any]) -> Any:
        self.calls[label] = asyncio.create_task(self.client.call_tool(name, arguments))
        return {}

    async def cancel(self, label: str) -> Any:
        task = self.calls.pop(label)
        task.cancel()
        await asyncio.wait([task])
        return {"cancelled": task.cancelled()}


def dumped(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    return value


async def outcome(step: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(PATIENCE):
            return {"result": dumped(await step())}
    except Fault as error:
        return {"error": {"code": error.error.code, "message": error.error.message}}
    except TimeoutError:
        return {"failed": "timeout"}


@contextlib.asynccontextmanager
async def second_generation(setup: dict[str, Any], heard: Any) -> AsyncIterator[Any]:
    if setup["mode"] == "legacy":
        # The SDK asks for its newest; older clients ask for theirs.
        session_module.LATEST_HANDSHAKE_VERSION = setup["version"]
    server = setup["url"] or parameters(setup)
    async with sdk.Client(server, mode=setup["mode"], message_handler=heard) as client:
        yield client


class First:
    """A session of the SDK's first generation, by the names the second has."""

    def __init__(self, session: Any, begun: Any) -> None:
        self.session = session
        self.protocol_version = begun.protocolVersion
        self.server_info = begun.serverInfo
        self.server_capabilities = begun.capabilities
        self.instructions = begun.instructions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    async def read_resource(self, uri: str, cache_mode: str) -> Any:
        return await self.session.read_resource(uri)


@contextlib.asynccontextmanager
async def first_generation(setup: dict[str, Any], heard: Any) -> AsyncIterator[Any]:
    importlib.import_module("mcp.types").LATEST_PROTOCOL_VERSION = setup["version"]  # type: ignore[attr-defined]
    if setup["url"]:
        http: Any = importlib.import_module("mcp.client.streamable_http")
        transport = http.streamablehttp_client(setup["url"])
    else:
        stdio: Any = importlib.import_module("mcp.client.stdio")
        transport = stdio.stdio_client(parameters(setup))
    async with (
        transport as (reader, writer, *_),
        sdk.ClientSession(reader, writer, message_handler=heard) as session,
    ):
        yield First(session, await session.initialize())


def parameters(setup: dict[str, Any]) -> Any:
    program, *arguments = setup["command"]
    return sdk.StdioServerParameters(command=program, args=arguments, env=setup["env"])


def say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def read_line() -> dict[str, Any] | None:
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return dict(json.loads(line)) if line else None


async def converse(setup: dict[str, Any]) -> None:
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue(100)

    async def heard(message: Any) -> None:
        failed = isinstance(message, Exception)
        told.put_nowait({"failed": repr(message)} if failed else dumped(message))

    connect = first_generation if IS_FIRST else second_generation
    async with connect(setup, heard) as client:
        driver = Driver(client, told)
        async with driver.streams:
            say(await outcome(driver.info))
            while (step := await read_line()) is not None and step["do"] != "end":
                method = getattr(driver, step.pop("do"))
                say(await outcome(functools.partial(method, **step)))


async def main() -> None:
    while (setup := await read_line()) is not None:
        try:
            await converse(setup)
            say({"result": "ended"})
        except Exception as error:
            say({"failed": repr(error)})


if __name__ == "__main__":
    asyncio.run(main())
