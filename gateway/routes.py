"""Every route of the API, in the order in which they are tried."""

from __future__ import annotations

from voidbus.actors.messages.runs import RunEvent
from voidbus.actors.messages.sessions import SessionMessage
from voidbus.actors.messages.sidecar import InboxEntry, InboxSnapshot, Intent
from voidbus.gateway import about, artifacts, events, messages, runs
from voidbus.gateway.problems import Code
from voidbus.gateway.router import Query, Route
from voidbus.gateway.wire import (
    Cancelled,
    CancelRequest,
    Health,
    Ok,
    RunsView,
    RunView,
    SessionRequest,
    StagesView,
    Started,
    StartRequest,
    TelemetryView,
)

_V2 = Query(
    "api_version", "`v2`: events bear their second name.", {"type": "string", "enum": ["v1", "v2"]}
)
_FROM_EVENT = Query("from_event_id", "Only what follows the event of this id.")
_WAIT = Query(
    "wait", "`false`: do not wait for the run's end.", {"type": "string", "enum": ["true", "false"]}
)
_RUN = "/v1/runs/{run_id}"
_STAGE = _RUN + "/stages/{stage:path}"

ROUTES = (
    Route("GET", "/v1/health", runs.health, "Is the API there?", Health, tag="about"),
    Route(
        "POST",
        "/v1/runs",
        runs.start,
        "Start a run of a specification on the supervisor's host",
        Started,
        body=StartRequest,
        problems=(
            Code.INVALID_SPEC,
            Code.INVALID_POLICY,
            Code.INVALID_PARAMS,
            Code.ALREADY_TERMINAL,
            Code.RESOURCE_LIMIT_EXCEEDED,
        ),
    ),
    Route(
        "GET",
        "/v1/runs",
        runs.list_runs,
        "All runs with their events, newest first",
        RunsView,
        query=(
            Query("state", "`active` or `terminal`; anything else is all.", {"type": "string"}),
        ),
    ),
    Route(
        "*",
        _RUN + "/events",
        events.events,
        "A run's events",
        (RunEvent,),
        query=(_FROM_EVENT, _V2),
        problems=(Code.NOT_FOUND,),
        tag="events",
    ),
    Route(
        "GET",
        _RUN + "/events/stream",
        events.stream,
        "A run's events as they come, as server-sent events; go on with Last-Event-ID",
        "text/event-stream",
        query=(_FROM_EVENT, _V2),
        problems=(Code.NOT_FOUND,),
        tag="events",
    ),
    Route(
        "GET",
        _RUN + "/logs",
        events.logs,
        "What a run's programs printed",
        "text/plain",
        query=(
            Query("follow", "`true`: go on until the run's end.", {"type": "string"}),
            Query("stage", "Of this stage only."),
            Query(
                "stream",
                "Of this stream only.",
                {"type": "string", "enum": ["stdout", "stderr"]},
            ),
        ),
        problems=(Code.NOT_FOUND, Code.INVALID_PARAMS),
        tag="events",
    ),
    Route(
        "POST",
        _RUN + "/cancel",
        runs.cancel,
        "Cancel a run; answered when it has ended",
        Cancelled,
        body=CancelRequest,
        query=(_WAIT,),
        problems=(Code.NOT_FOUND,),
    ),
    Route(
        "GET",
        _RUN + "/stages",
        runs.stages,
        "A run's stages",
        StagesView,
        problems=(Code.NOT_FOUND,),
    ),
    Route(
        "GET",
        _RUN + "/telemetry",
        runs.telemetry,
        "What a run uses",
        TelemetryView,
        query=(
            Query("from_seq", "Samples with a greater seq.", {"type": "integer", "minimum": 0}),
            Query("stage_name", "Of this stage only."),
        ),
        problems=(Code.NOT_FOUND, Code.INVALID_PARAMS),
    ),
    Route(
        "GET",
        _STAGE + "/output-file",
        artifacts.output_file,
        "A stage's structured output",
        "application/json, application/octet-stream",
        problems=(
            Code.NOT_FOUND,
            Code.STRUCTURED_OUTPUT_MISSING,
            Code.STRUCTURED_OUTPUT_MALFORMED,
            Code.ARTIFACT_STORE_UNAVAILABLE,
        ),
        tag="artifacts",
    ),
    Route(
        "GET",
        _STAGE + "/artifacts/{name}",
        artifacts.artifact,
        "A file that a stage's output names",
        "application/json, text/plain, application/octet-stream",
        problems=(
            Code.NOT_FOUND,
            Code.INVALID_PARAMS,
            Code.ARTIFACT_NOT_FOUND,
            Code.ARTIFACT_PUBLICATION_INCOMPLETE,
            Code.ARTIFACT_STORE_UNAVAILABLE,
        ),
        tag="artifacts",
    ),
    Route(
        "PUT",
        _RUN + "/inbox",
        messages.put_inbox,
        "Replace the inbox of a run's agent",
        Ok,
        body=InboxSnapshot,
        problems=(Code.NOT_FOUND, Code.INVALID_PARAMS),
        tag="messages",
    ),
    Route(
        "POST",
        _RUN + "/messages",
        messages.post_message,
        "Add a message to the inbox of a run's agent",
        Ok,
        body=InboxEntry,
        problems=(Code.NOT_FOUND, Code.INVALID_PARAMS),
        tag="messages",
    ),
    Route(
        "GET",
        _RUN + "/intents",
        messages.intents,
        "Take the intents that a run's agent has sent",
        (Intent,),
        problems=(Code.NOT_FOUND,),
        tag="messages",
    ),
    Route(
        "GET",
        _RUN,
        runs.inspect,
        "A run with its events",
        RunView,
        query=(_V2,),
        problems=(Code.NOT_FOUND,),
    ),
    Route(
        "POST",
        "/v1/sessions/{session_id}/messages",
        messages.add_to_session,
        "Add to a session",
        SessionMessage,
        body=SessionRequest,
        problems=(Code.INVALID_SPEC, Code.INVALID_PARAMS),
        tag="sessions",
    ),
    Route(
        "GET",
        "/v1/sessions/{session_id}/messages",
        messages.read_session,
        "What was said in a session",
        (SessionMessage,),
        problems=(Code.INVALID_PARAMS,),
        tag="sessions",
    ),
    Route(
        "GET",
        "/metrics",
        about.metrics,
        "Figures for Prometheus",
        "text/plain",
        tag="about",
    ),
    Route("GET", "/openapi.json", about.openapi, "This document", "application/json", tag="about"),
    Route(
        "GET",
        "/v1/runs/{rest:path}",
        runs.unmatched,
        "No such run",
        "application/json",
        tag="fallback",
    ),
)
