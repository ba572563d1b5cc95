"""What runs leave behind: their structured output and the files it names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from voidbus.transport.message import Message, Right

RESULT_NAME = "result.json"
"""What a manifest calls a stage's structured output."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class StoredArtifact(_Part):
    """A file of a run that is kept. `name` "" is the stage's output file; `digest` is the SHA-256
    of the content in hex."""

    stage: str
    name: str
    media_type: str
    size_bytes: int
    digest: str


class ManifestEntry(_Part):
    """A line of a run's manifest. Without `size_bytes` and `digest` the bytes were not kept."""

    name: str
    stage: str
    media_type: str
    size_bytes: int | None = None
    digest: str | None = None
    retrieval_path: str


class ArtifactPublication(_Part):
    """What a run has published. `published_at` is set once something is."""

    status: Literal["not_started", "publishing", "published", "failed"] = "not_started"
    published_at: str | None = None
    manifest: tuple[ManifestEntry, ...] = ()


class FindArtifact(Message, tag="artifacts.find", right=Right.OBSERVE):
    """Which content is kept as `name` of a run's stage? `name` "" asks for the output file."""

    run_id: str
    stage: str
    name: str = ""


class ListArtifacts(Message, tag="artifacts.list", right=Right.OBSERVE):
    """Everything that is kept of a run, also what its manifest does not list."""

    run_id: str


class ArtifactList(Message, tag="artifacts.listed"):
    """Kept files, by stage and name."""

    run_id: str
    artifacts: tuple[StoredArtifact, ...]


class ReadArtifact(Message, tag="artifacts.read", right=Right.OBSERVE):
    """Bytes of a kept file, from `offset` on. `digest` makes sure that the parts read one after
    another are of one content; without it, the newest is read."""

    run_id: str
    stage: str
    name: str = ""
    offset: int = Field(default=0, ge=0)
    limit: int = Field(default=1024 * 1024, ge=0, le=1024 * 1024)
    digest: str | None = None


class ArtifactPart(Message, tag="artifacts.part"):
    """The bytes are the reply's attachment; `artifact` tells of the whole."""

    artifact: StoredArtifact
    offset: int
