"""Runs: start, list, inspect, cancel, their stages and their telemetry."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache

from aiohttp import web
from pydantic import BaseModel, ValidationError

from voidbus.actors.messages.journal import ReadStages, StageEvents
from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    InspectRun,
    ListRuns,
    ReadRawEvents,
    RunAccepted,
    RunList,
    RunState,
    StartRun,
    is_run_id,
    run_node,
)
from voidbus.actors.messages.sidecar import InspectSidecar, SidecarState
from voidbus.actors.messages.telemetry import ReadTelemetry, TelemetryPage
from voidbus.gateway.api import Api
from voidbus.gateway.bus import Bus
from voidbus.gateway.events import EventJson, read_from, wants_v2
from voidbus.gateway.feed import JOURNAL
from voidbus.gateway.problems import Code, Problem, problem_of
from voidbus.gateway.router import Call, explain
from voidbus.gateway.run_reader import KeptRun
from voidbus.gateway.spooled import Spooled
from voidbus.gateway.stages_view import stages_of
from voidbus.gateway.wire import (
    Cancelled,
    CancelRequest,
    Health,
    RunHead,
    SidecarView,
    StagesView,
    Started,
    StartRequest,
    TelemetryView,
)
from voidbus.spec.policy import Policy
from voidbus.transport.fault import Fault, FaultReason

RUNS = "supervisor/runs"
TELEMETRY = "supervisor/telemetry"

_START_SECONDS = 40.0
_SIDECAR_SECONDS = 2.0
# A cancel is answered when the run has ended: the default grace is 30 s, and clients give a request
# 60 s.
_CANCEL_SECONDS = 55.0
_RUNS_AT_ONCE = 1000
# Runs whose events are held at one time, for a list.
_READ_AT_ONCE = 32
# States that are held as the API writes them, and how long one of them may be (bytes).
_HEADS_HELD = 512
_SHORT_STATE = 8192


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """A model as an answer."""
    return web.Response(
        body=model.__pydantic_serializer__.to_json(model),
        status=status,
        content_type="application/json",
    )


async def health(_: Call) -> web.StreamResponse:
    return answer(Health())


async def start(call: Call) -> web.StreamResponse:
    request = await call.model(StartRequest, Code.INVALID_SPEC)
    if request.policy is not None:
        _check_policy(request.policy)
    if request.run_id is not None and not is_run_id(request.run_id):
        raise Problem(
            Code.INVALID_PARAMS,
            f"run_id {request.run_id[:80]!r}: use 1 to 100 of A-Z a-z 0-9 . _ - only",
        )
    message = StartRun(
        file=request.file,
        input=request.input,
        run_id=request.run_id,
        policy=request.policy,
        snapshot=request.snapshot,
        strict=False,
    )
    outcome = await call.api.bus.find(RUNS, message, RunAccepted, _START_SECONDS)
    if isinstance(outcome, Fault):
        if outcome.reason is FaultReason.STALE:
            raise Problem(Code.ALREADY_TERMINAL, outcome.detail)
        raise problem_of(outcome)
    return answer(
        Started(run_id=outcome.run_id, attempt_id=outcome.attempt_id, state=outcome.state)
    )


def _check_policy(policy: dict[str, object]) -> None:
    """Raises Problem with the code that tells a limit that makes no sense from a wrong type."""
    try:
        Policy.model_validate(policy)
    except ValidationError as error:
        senseless = [p["msg"] for p in error.errors(include_url=False) if p["type"] == "policy"]
        if senseless:
            raise Problem(Code.INVALID_POLICY, senseless[0]) from None
        raise Problem(Code.INVALID_SPEC, f"policy: {explain(error)}") from None


async def list_runs(call: Call) -> web.StreamResponse:
    state = call.query("state")
    wanted = state if state in ("active", "terminal") else None
    with Spooled() as spooled:
        spooled.write(b'{"runs":[')
        before, offset = b"", 0
        while True:
            page = await call.api.bus.get(
                JOURNAL,
                ListRuns.model_validate(
                    {"state": wanted, "limit": _RUNS_AT_ONCE, "offset": offset}
                ),
                RunList,
            )
            for at in range(0, len(page.runs), _READ_AT_ONCE):
                some = page.runs[at : at + _READ_AT_ONCE]
                before = await _write_listed(call.api, spooled, before, some)
            offset += len(page.runs)
            if not page.runs or offset >= page.total:
                break
        spooled.write(b"]}")
        return await spooled.send(call.request)


async def _write_listed(
    api: Api, spooled: Spooled, before: bytes, runs: Sequence[RunState]
) -> bytes:
    """Runs of a list behind `before`; what goes before the next."""
    found = await asyncio.gather(*(api.reader.read(run.id) for run in runs), return_exceptions=True)
    for run, kept in zip(runs, found, strict=True):
        if isinstance(kept, KeptRun):
            head, _ = _head(kept.state)
            spooled.write(before + head)
            await _write_events(api.bus, spooled, run.id, kept, v2=False)
            before = b","
        elif not (isinstance(kept, Problem) and kept.code is Code.NOT_FOUND):
            raise kept
        # Else it was pruned meanwhile.
    return before


async def inspect(call: Call) -> web.StreamResponse:
    bus, run_id = call.api.bus, call.params["run_id"]
    kept = await call.api.reader.read(run_id)
    head, ended = _head(kept.state)
    with Spooled() as spooled:
        spooled.write(head)
        sidecar = None if ended else await _sidecar(bus, run_id)
        if sidecar is not None:
            view = SidecarView.of(sidecar)
            spooled.write(b',"sidecar":' + view.__pydantic_serializer__.to_json(view))
        await _write_events(bus, spooled, run_id, kept, v2=wants_v2(call))
        return await spooled.send(call.request)


async def _sidecar(bus: Bus, run_id: str) -> SidecarState | None:
    found = await bus.find(
        f"{run_node(run_id)}/sidecar", InspectSidecar(), SidecarState, _SIDECAR_SECONDS
    )
    return found if isinstance(found, SidecarState) else None


def _head(state: bytes) -> tuple[bytes, bool]:
    """A run's state as the API writes it, without the closing brace, and whether it has ended."""
    return _short_head(state) if len(state) <= _SHORT_STATE else _written_head(state)


def _written_head(state: bytes) -> tuple[bytes, bool]:
    run = RunState.from_json(state)
    head = RunHead.of(run)
    return head.__pydantic_serializer__.to_json(head)[:-1], run.status.terminal


# Who polls a run mostly finds it as it was.
_short_head = lru_cache(maxsize=_HEADS_HELD)(_written_head)


async def _write_events(
    bus: Bus, spooled: Spooled, run_id: str, kept: KeptRun, *, v2: bool
) -> None:
    """A run's events, which are passed on as they are kept, behind its head."""
    spooled.write(b',"events":[')
    events = EventJson(v2=v2)
    spooled.write(events.page(kept.events))
    if kept.last < kept.last_seq:
        async for more in read_from(bus, ReadRawEvents(run_id=run_id, after=kept.last)):
            spooled.write(events.page(more))
    spooled.write(b"]}")


async def cancel(call: Call) -> web.StreamResponse:
    run_id = call.params["run_id"]
    request = await _cancel_request(call)
    message = CancelRun(run_id=run_id, reason=request.reason, grace=request.grace_secs)
    outcome = await call.api.bus.get(RUNS, message, CancelAccepted)
    if outcome.terminal_event_id is None and call.query("wait") != "false":
        await call.api.feeds.wait_end(run_id, _CANCEL_SECONDS)
    run = await call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
    return answer(
        Cancelled(run_id=run_id, state=run.status, terminal_event_id=run.terminal_event_id)
    )


async def _cancel_request(call: Call) -> CancelRequest:
    """A body that says nothing sensible says nothing: a cancel is not refused for it."""
    try:
        return await call.model(CancelRequest, Code.INVALID_PARAMS)
    except Problem:
        return CancelRequest()


async def stages(call: Call) -> web.StreamResponse:
    run_id = call.params["run_id"]
    run, events = await asyncio.gather(
        call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState),
        call.api.bus.get(JOURNAL, ReadStages(run_id=run_id), StageEvents),
    )
    return answer(
        StagesView(
            run_id=run_id,
            attempt_id=run.attempt_id,
            updated_at=run.updated_at,
            # A service has no stages to show.
            stages=stages_of(events.events),
        )
    )


async def telemetry(call: Call) -> web.StreamResponse:
    run_id = call.params["run_id"]
    from_seq = call.query_number("from_seq", 0)
    await call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
    read = ReadTelemetry(run_id=run_id, from_seq=from_seq, stage_name=call.query("stage_name"))
    page = await call.api.bus.get(TELEMETRY, read, TelemetryPage)
    return answer(TelemetryView.of(page))


async def unmatched(call: Call) -> web.StreamResponse:
    """What else is asked for below /v1/runs/ is taken for the id of a run, which there can't be."""
    raise Problem(Code.NOT_FOUND, f"run '{call.params['rest'][:200]}' not found")
