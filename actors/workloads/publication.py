"""What the outputs of a run's stages come to: its manifest, or why it is a failure. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote

from voidbus.actors.messages.artifacts import (
    RESULT_NAME,
    ArtifactPublication,
    ManifestEntry,
    StoredArtifact,
)
from voidbus.actors.messages.file_content import read_json


class OutputFault(StrEnum):
    """Why a stage's output is no structured output."""

    MISSING = "missing"
    MALFORMED = "malformed"
    NO_STATUS = "no_status"


@dataclass(frozen=True)
class StageOutput:
    """What a completed stage left: its output file, why that is no structured output, and the
    files it names (those without a size were named and not kept)."""

    stage: str
    output: StoredArtifact | None
    fault: OutputFault | None = None
    artifacts: tuple[ManifestEntry, ...] = ()


@dataclass(frozen=True)
class Published:
    """The run's manifest, and why a run that needs structured output failed for lack of it."""

    publication: ArtifactPublication
    error: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class NamedArtifact:
    """A file that structured output names. `path` is where it is in the guest."""

    name: str
    media_type: str
    path: str


def publish(
    run_id: str, outputs: Sequence[StageOutput], *, required: bool, stages_ran: bool, now: str
) -> Published:
    """The manifest of a run whose completed stages left `outputs`, in that order.

    Where structured output is required, the first stage without it decides. Else it is passed
    over.
    """
    if required and stages_ran and not outputs:
        return Published(ArtifactPublication(status="failed"))
    manifest: list[ManifestEntry] = []
    for output in outputs:
        if output.fault is None:
            manifest += manifest_of(run_id, output)
        elif required:
            return _failed(run_id, output, manifest)
    if not manifest:
        return Published(ArtifactPublication())
    return Published(
        ArtifactPublication(status="published", published_at=now, manifest=tuple(manifest))
    )


def manifest_of(run_id: str, output: StageOutput) -> list[ManifestEntry]:
    """The lines of one stage."""
    if output.output is None:
        return list(output.artifacts)
    media_type = "application/json"
    if output.fault is OutputFault.MALFORMED:
        media_type = "application/octet-stream"
    return [
        ManifestEntry(
            name=RESULT_NAME,
            stage=output.stage,
            media_type=media_type,
            size_bytes=output.output.size_bytes,
            digest=output.output.digest,
            retrieval_path=output_path(run_id, output.stage),
        ),
        *output.artifacts,
    ]


def _failed(run_id: str, output: StageOutput, before: list[ManifestEntry]) -> Published:
    if output.fault is OutputFault.MISSING:
        return Published(
            ArtifactPublication(status="failed"),
            f"stage '{output.stage}' completed without {RESULT_NAME}",
            "STRUCTURED_OUTPUT_MISSING",
        )
    what = "is not JSON"
    if output.fault is OutputFault.NO_STATUS:
        what = "is no JSON object with a `status`"
    lines = before + manifest_of(run_id, output)
    return Published(
        ArtifactPublication(status="failed", manifest=tuple(lines)),
        f"stage '{output.stage}': its structured output {what}",
        "STRUCTURED_OUTPUT_MALFORMED",
    )


def output_path(run_id: str, stage: str) -> str:
    """Where the HTTP API has a stage's output file."""
    return f"/v1/runs/{run_id}/stages/{quote(stage, safe='')}/output-file"


def artifact_path(run_id: str, stage: str, name: str) -> str:
    """Where the HTTP API has a named artifact."""
    return f"/v1/runs/{run_id}/stages/{quote(stage, safe='')}/artifacts/{quote(name, safe='')}"


def is_artifact_name(name: str) -> bool:
    """Whether it can be asked for by HTTP: one part of a path."""
    return bool(name.strip()) and not any(bad in name for bad in ("..", "/", "\\", "\0"))


def read_structured(content: bytes | None) -> tuple[OutputFault | None, list[NamedArtifact]]:
    """What is wrong with structured output, and the files it names. `content` None: it is too
    large to be looked at."""
    if content is None:
        return OutputFault.MALFORMED, []
    try:
        document = read_json(content)
    except ValueError:
        return OutputFault.MALFORMED, []
    if not isinstance(document, dict) or "status" not in document:
        return OutputFault.NO_STATUS, []
    listed = document.get("artifacts")
    return None, [
        named
        for item in (listed if isinstance(listed, list) else [])
        if (named := _named(item)) is not None
    ]


def _named(item: object) -> NamedArtifact | None:
    if not isinstance(item, dict):
        return None
    name, media_type, path = (item.get(key) for key in ("name", "media_type", "path"))
    if not isinstance(name, str) or not name:
        return None
    if not isinstance(path, str) or not path:
        path = name
    return NamedArtifact(
        name,
        media_type if isinstance(media_type, str) and media_type else "application/octet-stream",
        path if path.startswith("/") else f"/workspace/{path}",
    )
