"""`voidbus artifacts`: the files a run has left, listed or fetched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from voidbus.actors.messages.artifacts import (
    RESULT_NAME,
    ArtifactList,
    ArtifactPart,
    ListArtifacts,
    ReadArtifact,
    StoredArtifact,
)
from voidbus.cli.connect import JOURNAL, Supervisor, connect
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.find import find_run
from voidbus.cli.options import Place, json_option, place_options, run_argument
from voidbus.cli.output import note, plain, print_json, print_table, size

ARCHIVE = "supervisor/archive"


@click.command()
@run_argument
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--stage", metavar="STAGE", help="Of this stage only.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write it to this file instead of standard output.",
)
@json_option
@place_options
@click.pass_obj
def artifacts(
    place: Place,
    run: str,
    name: str | None,
    stage: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """List the files a run has left, or fetch the one called NAME.

    A stage's structured output is called result.json. Files are there as soon as their stage has
    completed, and until the run is pruned.
    """
    if name is None and output is not None:
        raise click.UsageError("--output goes with a NAME")
    with connect(place.where) as supervisor:
        run_id = find_run(supervisor, run).id
        kept = supervisor.ask(JOURNAL, ListArtifacts(run_id=run_id), ArtifactList).artifacts
        found = [each for each in kept if stage is None or each.stage == stage]
        if name is not None:
            _fetch(supervisor, run_id, _choose(run_id, name, found), output)
            return
    if as_json:
        print_json({"run_id": run_id, "artifacts": [_document(each) for each in found]})
        return
    if not found:
        note(f"{run_id} has left no files")
        return
    print_table(
        ("STAGE", "NAME", "SIZE", "TYPE", "SHA-256"),
        [
            (each.stage, _name(each), size(each.size_bytes), each.media_type, each.digest[:12])
            for each in found
        ],
    )


def _name(artifact: StoredArtifact) -> str:
    return artifact.name or RESULT_NAME


def _document(artifact: StoredArtifact) -> dict[str, object]:
    return artifact.model_dump(mode="json") | {"name": _name(artifact)}


def _choose(run_id: str, name: str, found: list[StoredArtifact]) -> StoredArtifact:
    """The one file of that name. Raises Failure where there is none, or one in several stages."""
    named = [each for each in found if _name(each) == name]
    if not named:
        names = ", ".join(sorted({_name(each) for each in found})) or "none"
        raise Failure(f"{run_id} has left no file {plain(name)!r}; it has: {plain(names)}")
    if len({each.digest for each in named}) > 1:
        stages = ", ".join(plain(each.stage) for each in named)
        raise Failure(
            f"several stages of {run_id} have left a {plain(name)!r}: {stages}; choose one with "
            "--stage",
            ExitCode.USAGE,
        )
    return named[0]


def _fetch(
    supervisor: Supervisor, run_id: str, artifact: StoredArtifact, output: Path | None
) -> None:
    if output is None:
        stream = sys.stdout.buffer
        sys.stdout.flush()
        for part in _parts(supervisor, run_id, artifact):
            stream.write(part)
        stream.flush()
        return
    # Whole or not at all.
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with fresh.open("xb") as file:
            for part in _parts(supervisor, run_id, artifact):
                file.write(part)
        fresh.replace(output)
    except OSError as error:
        raise Failure(f"{output} can't be written: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)


def _parts(supervisor: Supervisor, run_id: str, artifact: StoredArtifact) -> Iterator[bytes]:
    offset = 0
    while offset < artifact.size_bytes:
        message = ReadArtifact(
            run_id=run_id,
            stage=artifact.stage,
            name=artifact.name,
            offset=offset,
            digest=artifact.digest,
        )
        asked = supervisor.begin(ARCHIVE, message)
        supervisor.finish(asked, ArtifactPart)
        part = asked.attachments[0] if asked.attachments else b""
        if not part:
            raise Failure(f"{run_id}: the file ended after {offset} bytes; it may be damaged")
        yield part
        offset += len(part)
