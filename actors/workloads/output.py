"""Collecting what a completed stage left, while its machine is still there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from voidbus.actors.messages.artifacts import ManifestEntry, StoredArtifact
from voidbus.actors.workloads.conductor import ERROR_LIMIT, Conductor, GuestMachine, KeptFile
from voidbus.actors.workloads.publication import (
    NamedArtifact,
    OutputFault,
    StageOutput,
    artifact_path,
    is_artifact_name,
    read_structured,
)

# What a run may leave behind in all, and in files of one stage: a guest must not fill the disk.
RUN_BYTES_LIMIT = 1024 * 1024 * 1024
STAGE_FILES_LIMIT = 64

Collected = Callable[[StageOutput, KeptFile | None], None]


class OutputCollector:
    """Reads the outputs of one run's stages and keeps what they name."""

    def __init__(
        self, conductor: Conductor, run_id: str, bytes_limit: int = RUN_BYTES_LIMIT
    ) -> None:
        self._conductor = conductor
        self._run_id = run_id
        self._left = bytes_limit
        self._counted: set[str] = set()  # digests: content that comes again takes no more room
        self._listed: dict[tuple[str, str], str] = {}  # the digest kept under a stage and a name

    def collect(
        self,
        machine: GuestMachine,
        stage: str,
        path: str,
        then: Collected,
        *,
        also_as: str | None = None,
    ) -> None:
        """Keep the file at `path` as the output of `stage`, and the files it names; `then` gets
        what that came to, and the output file itself. `also_as` is a second stage's name to keep
        all of it under."""
        stages = (stage,) if also_as is None else (stage, also_as)

        def kept(outcome: KeptFile | str | None) -> None:
            if isinstance(outcome, str):
                self._refused(stage, path, outcome)
            if not isinstance(outcome, KeptFile) or not outcome.size_bytes:  # empty is no output
                then(StageOutput(stage, None, OutputFault.MISSING), None)
                return
            self._count(outcome)
            stored = self._list(stages, "", outcome.media_type, outcome)
            fault, named = read_structured(outcome.content)
            gathering = _Gathering(stage, stages, stored, fault, deque(self._askable(stage, named)))
            self._gather(machine, gathering, lambda output: then(output, outcome))

        machine.keep_file(path, self._left, kept)

    def _count(self, file: KeptFile) -> None:
        if file.digest not in self._counted:
            self._counted.add(file.digest)
            self._left -= file.size_bytes

    def _askable(self, stage: str, named: list[NamedArtifact]) -> list[NamedArtifact]:
        """The files that can be kept under their names; the others are told of."""
        fine = {each.name: each for each in named if is_artifact_name(each.name)}
        for each in named:
            if each.name not in fine:
                self._refused(stage, each.name, "a name must be one part of a path")
        askable = list(fine.values())
        for each in askable[STAGE_FILES_LIMIT:]:
            self._refused(stage, each.name, f"{STAGE_FILES_LIMIT} files are kept of a stage")
        return askable[:STAGE_FILES_LIMIT]

    def _gather(
        self,
        machine: GuestMachine,
        gathering: _Gathering,
        then: Callable[[StageOutput], None],
    ) -> None:
        """Keep the named files one after another."""
        if not gathering.waiting:
            then(gathering.output())
            return
        named = gathering.waiting.popleft()

        def kept(outcome: KeptFile | str | None) -> None:
            file = outcome if isinstance(outcome, KeptFile) else None
            if file is None:
                why = outcome if isinstance(outcome, str) else f"there is no {named.path}"
                self._refused(gathering.stage, named.name, why)
            else:
                self._count(file)
                self._list(gathering.stages, named.name, named.media_type, file)
            gathering.entries.append(
                ManifestEntry(
                    name=named.name,
                    stage=gathering.stage,
                    media_type=named.media_type,
                    size_bytes=file.size_bytes if file else None,
                    digest=file.digest if file else None,
                    retrieval_path=artifact_path(self._run_id, gathering.stage, named.name),
                )
            )
            self._gather(machine, gathering, then)

        machine.keep_file(named.path, self._left, kept)

    def _list(
        self, stages: tuple[str, ...], name: str, media_type: str, file: KeptFile
    ) -> StoredArtifact:
        stored = [
            StoredArtifact(
                stage=stage,
                name=name,
                media_type=media_type,
                size_bytes=file.size_bytes,
                digest=file.digest,
            )
            for stage in stages
        ]
        for each in stored:
            if self._listed.get((each.stage, name)) != each.digest:
                self._listed[each.stage, name] = each.digest
                self._conductor.kept(each)
        return stored[0]

    def _refused(self, stage: str, name: str, why: str) -> None:
        self._conductor.emit(
            "artifact.refused",
            f"{name[:200]!r} is not kept: {why}"[:ERROR_LIMIT],
            level="warn",
            stage=stage,
        )


class _Gathering:
    """One stage's output while its files are kept."""

    def __init__(
        self,
        stage: str,
        stages: tuple[str, ...],
        stored: StoredArtifact,
        fault: OutputFault | None,
        waiting: deque[NamedArtifact],
    ) -> None:
        self.stage = stage
        self.stages = stages
        self.waiting = waiting
        self.entries: list[ManifestEntry] = []
        self._stored = stored
        self._fault = fault

    def output(self) -> StageOutput:
        return StageOutput(self.stage, self._stored, self._fault, tuple(self.entries))
