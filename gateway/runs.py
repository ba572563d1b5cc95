"""Runs: start, list, inspect, cancel, their stages and their telemetry."""

from __future__ import annotations

import asyncio

from aiohttp import web
from pydantic import BaseModel, ValidationError

from voidbus.actors.messages.journal import ReadStages, StageEvents
from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    InspectRun,
    ListRuns,
    RawEvents,
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
from voidbus.gateway.bus import Bus
from voidbus.gateway.events import EventJson, read_from, wants_v2
from voidbus.gateway.feed import JOURNAL
from voidbus.gateway.problems import Code, Problem, problem_of
from voidbus.gateway.router import Call, explain
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
            for listed in page.runs:
                try:
                    await _write_run(call.api.bus, spooled, listed.id, before=before)
                except Problem as problem:
                    if problem.code is not Code.NOT_FOUND:
                        raise
                    continue  # it was pruned meanwhile
                before = b","
            offset += len(page.runs)
            if not page.runs or offset >= page.total:
                break
        spooled.write(b"]}")
        return await spooled.send(call.request)


async def inspect(call: Call) -> web.StreamResponse:
    bus, run_id = call.api.bus, call.params["run_id"]
    with Spooled() as spooled:
        await _write_run(bus, spooled, run_id, inspect=True, v2=wants_v2(call))
        return await spooled.send(call.request)


async def _sidecar(bus: Bus, run_id: str) -> SidecarState | None:
    found = await bus.find(
        f"{run_node(run_id)}/sidecar", InspectSidecar(), SidecarState, _SIDECAR_SECONDS
    )
    return found if isinstance(found, SidecarState) else None


async def _write_run(
    bus: Bus,
    spooled: Spooled,
    run_id: str,
    *,
    before: bytes = b"",
    inspect: bool = False,
    v2: bool = False,
) -> None:
    """A run with its events, which are passed on as they are kept, behind `before`. `inspect`:
    with its sidecar, if it has one. Raises Problem, having written nothing."""
    read = ReadRawEvents(run_id=run_id, with_state=True)
    page, (text, state) = await bus.read(JOURNAL, read, RawEvents)
    run = RunState.from_json(state)
    head = RunHead.of(run)
    spooled.write(before + head.__pydantic_serializer__.to_json(head)[:-1])
    if inspect and not run.status.terminal:
        sidecar = await _sidecar(bus, run_id)
        if sidecar is not None:
            view = SidecarView.of(sidecar)
            spooled.write(b',"sidecar":' + view.__pydantic_serializer__.to_json(view))
    spooled.write(b',"events":[')
    events = EventJson(v2=v2)
    spooled.write(events.page([line for line in text.split(b"\n") if line]))
    if page.last < page.last_seq:
        async for more in read_from(bus, ReadRawEvents(run_id=run_id, after=page.last)):
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
