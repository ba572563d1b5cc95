"""Files that runs have left: whole, or in part, without holding them in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aiohttp import web

from voidbus.actors.messages.artifacts import (
    ArtifactList,
    ArtifactPart,
    FindArtifact,
    ReadArtifact,
    StoredArtifact,
)
from voidbus.actors.messages.file_content import media_type_of
from voidbus.actors.messages.runs import InspectRun, RunState
from voidbus.gateway.feed import JOURNAL
from voidbus.gateway.problems import Code, Problem, problem_of
from voidbus.gateway.router import Call

ARCHIVE = "supervisor/archive"

_PART = 1024 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})\Z")
_JSON = "application/json"


async def output_file(call: Call) -> web.StreamResponse:
    run_id, stage = call.params["run_id"], call.params["stage"]
    found = await _find(call, run_id, stage, "")
    if found is None:
        raise Problem(Code.STRUCTURED_OUTPUT_MISSING, f"stage '{stage[:200]}' has no output file")
    if found.media_type != _JSON and await _owes_structured_output(call, run_id):
        raise Problem(
            Code.STRUCTURED_OUTPUT_MALFORMED,
            f"the output file of stage '{stage[:200]}' is not JSON",
        )
    media_type = _JSON if found.media_type == _JSON else "application/octet-stream"
    return await _send(call, run_id, found, media_type)


async def artifact(call: Call) -> web.StreamResponse:
    run_id, stage, name = (call.params[key] for key in ("run_id", "stage", "name"))
    if not name.strip() or any(bad in name for bad in ("..", "/", "\\", "\0")):
        raise Problem(Code.INVALID_PARAMS, "an artifact's name is one part of a path")
    found = await _find(call, run_id, stage, name)
    if found is None:
        run = await call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
        if run.artifact_publication.status == "publishing":
            raise Problem(Code.ARTIFACT_PUBLICATION_INCOMPLETE, f"run {run_id} is still publishing")
        raise Problem(
            Code.ARTIFACT_NOT_FOUND, f"stage '{stage[:200]}' has no artifact '{name[:200]}'"
        )
    return await _send(call, run_id, found, await _sniffed(call, run_id, found))


async def _find(call: Call, run_id: str, stage: str, name: str) -> StoredArtifact | None:
    message = FindArtifact(run_id=run_id, stage=stage, name=name)
    found = await call.api.bus.get(JOURNAL, message, ArtifactList)
    return found.artifacts[0] if found.artifacts else None


async def _owes_structured_output(call: Call, run_id: str) -> bool:
    """Whether the run failed, or would have, for an output file that is not JSON; services and
    workflows of several steps may publish what they like."""
    run = await call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
    report = run.report
    if report is None:
        return False
    # Of a workflow only the one that failed for it: those of one step that name their output step.
    return (
        report.kind in ("agent", "pipeline")
        or run.terminal_reason == Code.STRUCTURED_OUTPUT_MALFORMED
    )


async def _sniffed(call: Call, run_id: str, found: StoredArtifact) -> str:
    """What a named file is by its content: its media type is the guest's word only."""
    if found.size_bytes > _PART:
        return "application/octet-stream"
    return media_type_of(await _part(call, run_id, found, 0, found.size_bytes))


@dataclass(frozen=True)
class _Range:
    """Bytes `first` to `last`, both of them sent."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


_NOT_THERE = _Range(0, -1)


async def _send(
    call: Call, run_id: str, found: StoredArtifact, media_type: str
) -> web.StreamResponse:
    """RFC 9110: ETag (8.8.3), If-None-Match (13.1.2), Range (14.2), one range only."""
    request = call.request
    tag = f'"{found.digest}"'
    headers = {"ETag": tag, "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}
    if _matches(request.headers.get("If-None-Match"), tag):
        return web.Response(status=304, headers=headers)
    whole = _Range(0, found.size_bytes - 1)
    span = _range_of(request, found.size_bytes, tag) or whole
    if span is _NOT_THERE:
        headers["Content-Range"] = f"bytes */{found.size_bytes}"
        return web.Response(status=416, headers=headers)
    response = web.StreamResponse(status=200 if span is whole else 206, headers=headers)
    if span is not whole:
        response.headers["Content-Range"] = f"bytes {span.first}-{span.last}/{found.size_bytes}"
    response.content_type = media_type
    response.content_length = span.size
    if request.method == "HEAD":
        await response.prepare(request)
        return response
    # Before the head is sent: what is missing must be an error and not half an answer.
    part = await _part(call, run_id, found, span.first, min(_PART, span.size))
    await response.prepare(request)
    at = span.first
    while True:
        await response.write(part)
        at += len(part)
        if at > span.last or not part:
            break
        part = await _part(call, run_id, found, at, min(_PART, span.last - at + 1))
    await response.write_eof()
    return response


async def _part(call: Call, run_id: str, found: StoredArtifact, offset: int, limit: int) -> bytes:
    message = ReadArtifact(
        run_id=run_id,
        stage=found.stage,
        name=found.name,
        offset=offset,
        limit=limit,
        digest=found.digest,
    )
    answer = await call.api.bus.ask(ARCHIVE, message)
    if not isinstance(answer.message, ArtifactPart):
        problem = problem_of(answer.message)
        raise Problem(Code.ARTIFACT_STORE_UNAVAILABLE, str(problem))
    return answer.attachments[0] if answer.attachments else b""


def _matches(header: str | None, tag: str) -> bool:
    if header is None:
        return False
    given = [each.strip().removeprefix("W/") for each in header.split(",")]
    return "*" in given or tag in given


def _range_of(request: web.BaseRequest, size: int, tag: str) -> _Range | None:
    """The part that is asked for; None for all of it, _NOT_THERE for one beyond the end."""
    header = request.headers.get("Range")
    condition = request.headers.get("If-Range")
    if header is None or request.method == "HEAD" or (condition is not None and condition != tag):
        return None
    match = _RANGE.match(header.strip())
    if match is None or not (match[1] or match[2]):
        return None  # several, or another unit: it may be passed over
    if not match[1]:
        length = int(match[2])
        return _Range(max(0, size - length), size - 1) if length and size else _NOT_THERE
    first = int(match[1])
    last = int(match[2]) if match[2] else max(first, size - 1)
    if last < first:  # RFC 9110, 14.1.1: such a range is invalid, and passed over
        return None
    return _Range(first, min(last, size - 1)) if first < size else _NOT_THERE
