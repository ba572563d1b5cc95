"""The bridge to a run's sidecar: its inbox, its intents; and sessions."""

from __future__ import annotations

import time

from aiohttp import web

from voidbus.actors.messages.actor import Done
from voidbus.actors.messages.runs import InspectRun, RunState, run_node
from voidbus.actors.messages.sessions import (
    AddToSession,
    ReadSession,
    SessionMessage,
    SessionRead,
)
from voidbus.actors.messages.sidecar import (
    AcknowledgeIntents,
    InboxEntry,
    InboxSnapshot,
    InspectSidecar,
    Intent,
    IntentList,
    PushMessage,
    PutInbox,
    ReadIntents,
    SidecarState,
)
from voidbus.gateway.feed import JOURNAL
from voidbus.gateway.problems import Code, Problem, problem_of
from voidbus.gateway.protocol import deliver
from voidbus.gateway.router import Call
from voidbus.gateway.runs import RUNS, answer
from voidbus.gateway.wire import Ok, SessionRequest
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

_NO_SIDECAR = "no sidecar for run"
_SIDECAR_SECONDS = 5.0
# Of one answer; more wait for the next.
_INTENTS_LIMIT = 4096
_SESSION_ID_LIMIT = 200


async def put_inbox(call: Call) -> web.StreamResponse:
    inbox = await call.model(InboxSnapshot, Code.INVALID_PARAMS)
    await _tell_sidecar(call, PutInbox(run_id=call.params["run_id"], inbox=inbox))
    return answer(Ok())


async def post_message(call: Call) -> web.StreamResponse:
    entry = await call.model(InboxEntry, Code.INVALID_PARAMS)
    await _tell_sidecar(call, PushMessage(run_id=call.params["run_id"], entry=entry))
    return answer(Ok())


async def _tell_sidecar(call: Call, message: Message) -> None:
    outcome = await call.api.bus.find(RUNS, message, SidecarState)
    if isinstance(outcome, Fault):
        if outcome.reason is FaultReason.NO_SUCH_ACTOR:
            raise Problem(Code.NOT_FOUND, _NO_SIDECAR)
        raise problem_of(outcome)


async def intents(call: Call) -> web.StreamResponse:
    """All that wait, also those a run has left behind. They are taken away once they are sent, so
    that a client that has gone meanwhile loses nothing."""
    run_id = call.params["run_id"]
    # One client after another: none gets what another has.
    async with call.api.intents_lock(run_id):
        waiting = await _waiting_intents(call, run_id)
        if not waiting:
            await _require_sidecar(call, run_id)
        listed = IntentList(run_id=run_id, intents=tuple(waiting)).model_dump(mode="json")
        response = web.json_response(listed["intents"])
        if call.request.method == "HEAD" or not waiting:
            return response
        if await deliver(call.request, response):
            ids = tuple(intent.intent_id for intent in waiting)
            # Where this fails they are sent again, to whoever asks next.
            await call.api.bus.ask(RUNS, AcknowledgeIntents(run_id=run_id, intent_ids=ids))
        return response


async def _waiting_intents(call: Call, run_id: str) -> list[Intent]:
    """All that wait, as far as they can be had. Raises Problem where none can."""
    waiting: dict[str, Intent] = {}
    while len(waiting) <= _INTENTS_LIMIT:
        read = ReadIntents(run_id=run_id, offset=len(waiting))
        page = await call.api.bus.find(RUNS, read, IntentList)
        if isinstance(page, Fault):
            if waiting:
                break
            raise problem_of(page)
        if not page.intents:
            break
        waiting |= {intent.intent_id: intent for intent in page.intents}
    return list(waiting.values())


async def _require_sidecar(call: Call, run_id: str) -> None:
    """Raises Problem for a run that goes on and has none."""
    run = await call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
    if run.status.terminal:
        return
    sidecar = await call.api.bus.find(
        f"{run_node(run_id)}/sidecar", InspectSidecar(), SidecarState, _SIDECAR_SECONDS
    )
    if isinstance(sidecar, Fault):
        raise Problem(Code.NOT_FOUND, _NO_SIDECAR)


# -- sessions ----------------------------------------------------------------------------------


def _session_id(call: Call) -> str:
    session_id = call.params["session_id"]
    if len(session_id) > _SESSION_ID_LIMIT or not session_id.isprintable():
        raise Problem(
            Code.INVALID_PARAMS,
            f"a session's id has {_SESSION_ID_LIMIT} printable characters at most",
        )
    return session_id


async def add_to_session(call: Call) -> web.StreamResponse:
    session_id = _session_id(call)
    request = await call.model(SessionRequest, Code.INVALID_SPEC)
    message = SessionMessage(
        ts_ms=time.time_ns() // 1_000_000, role=request.role, content=request.content
    )
    await call.api.bus.get(JOURNAL, AddToSession(session_id=session_id, message=message), Done)
    return answer(message)


async def read_session(call: Call) -> web.StreamResponse:
    reply = await call.api.bus.ask(JOURNAL, ReadSession(session_id=_session_id(call)))
    if not isinstance(reply.message, SessionRead):
        raise problem_of(reply.message)
    lines = [line for part in reply.attachments for line in part.split(b"\n") if line]
    return web.Response(body=b"[" + b",".join(lines) + b"]", content_type="application/json")
