"""What the API says of itself and of the supervisor: metrics, and its own description."""

from __future__ import annotations

import asyncio

from aiohttp import web

from voidbus.actors.messages.actor import InspectSystem, SystemStatus
from voidbus.actors.messages.runs import CountRunStates, RunStateCounts
from voidbus.gateway.feed import JOURNAL
from voidbus.gateway.metrics import CONTENT_TYPE
from voidbus.gateway.openapi import describe
from voidbus.gateway.router import Call


async def metrics(call: Call) -> web.StreamResponse:
    bus = call.api.bus
    counts, system = await asyncio.gather(
        bus.ask(JOURNAL, CountRunStates()),
        bus.ask("supervisor/system", InspectSystem()),
    )
    body = call.api.metrics.show(
        runs=counts.message if isinstance(counts.message, RunStateCounts) else None,
        system=system.message if isinstance(system.message, SystemStatus) else None,
        followers=call.api.feeds.followers,
    )
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


async def openapi(call: Call) -> web.StreamResponse:
    from voidbus.gateway.routes import ROUTES

    return web.json_response(describe(ROUTES, call.api.release))
