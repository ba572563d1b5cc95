"""xoscar's actor in another process of its pool, called from the pool's main process."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import xoscar
from kit.measure import import_from_bench


class EchoActor(xoscar.Actor):  # type: ignore[misc]  # xoscar has no types
    async def echo(self, text: str) -> str:
        return text


class XoscarEcho:
    """A pool with one other process and the actor in it. A context manager, with its own loop."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        # Its processes are executed afresh and import the actor's class from this folder.
        import_from_bench()
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        self._pool = await xoscar.create_actor_pool("127.0.0.1", n_process=self._workers)
        self.actor: Any = await xoscar.create_actor(
            EchoActor,
            address=self._pool.external_address,
            uid="echo",
            allocate_strategy=xoscar.allocate_strategy.ProcessIndex(1),
        )
        await self.actor.echo("warm")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._pool.stop())
        self._loop.close()

    def asks(self, count: int, text: str) -> None:
        async def run() -> None:
            for _ in range(count):
                await self.actor.echo(text)

        self._loop.run_until_complete(run())

    def pipelined(self, count: int, text: str, window: int) -> None:
        async def caller(share: int) -> None:
            for _ in range(share):
                await self.actor.echo(text)

        async def run() -> None:
            await asyncio.gather(*(caller(count // window) for _ in range(window)))

        self._loop.run_until_complete(run())
